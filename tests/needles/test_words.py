"""Words belong to two splits, and haystacks are read from files."""

from pathlib import Path

import numpy as np
import pytest

from s2train.data.tokenizers import ByteTokenizer
from s2train.errors import ConfigError
from s2train.needles.haystack import Haystack
from s2train.needles.samples import TaskSampler
from s2train.needles.words import draw_pair, split_of, text_haystack


def test_training_and_evaluation_share_no_key_and_no_value() -> None:
    rng = np.random.default_rng()
    train = [draw_pair(rng, "train") for _ in range(400)]
    held_out = [draw_pair(rng, "eval") for _ in range(400)]
    for which in (0, 1):
        assert not {pair[which] for pair in train} & {pair[which] for pair in held_out}
        assert len({pair[which] for pair in held_out}) > 100
        assert {split_of(pair[which]) for pair in held_out} == {"eval"}


def test_pairs_depend_on_the_seed() -> None:
    first, second = ([draw_pair(np.random.default_rng(s), "eval") for s in range(9)] for _ in range(2))
    assert first == second


def test_needles_are_placed_between_the_sentences_nearest_to_their_depth() -> None:
    rng, tokenizer = np.random.default_rng(), ByteTokenizer()
    longest_sentence = len(" There and back again.")
    for depth in rng.random(20):
        sample = TaskSampler(tokenizer).sample(rng, 2000, float(depth), "eval")
        (start, stop), total = sample.spans[0], len(sample.prompt)
        question = stop - start - len(sample.answer)
        assert abs(start - depth * (total - (stop - start) - question)) <= longest_sentence / 2
        before, after = (tokenizer.decode(part.tolist()) for part in (sample.prompt[:start], sample.prompt[stop:]))
        assert before == "" or before.endswith(".")
        assert after.startswith(" ") or start == 0  # the first sentence of the filler is cut anywhere


def test_only_the_first_sentence_of_a_filler_may_be_incomplete() -> None:
    haystack = Haystack(ByteTokenizer(), "One two three. Four five! Six?")
    for length in np.random.default_rng().integers(1, 200, size=20).tolist():
        filler = haystack.draw(np.random.default_rng(), length)
        text = bytes(filler.tokens.tolist()).decode()
        assert len(text) == length
        parts = [text[a:b] for a, b in zip(filler.borders, filler.borders[1:], strict=False)]
        assert "".join(parts) == text
        assert set(parts[1:]) <= {" One two three.", " Four five!", " Six?"}


@pytest.mark.parametrize("text", ["一二三四五六七八九十。" * 40, "\n".join(f"item {n}" for n in range(400))])
def test_a_text_without_full_stops_can_take_needles_everywhere(text: str) -> None:
    filler = Haystack(ByteTokenizer(), text).draw(np.random.default_rng(), 3000)
    assert np.diff(filler.borders).max() <= 64


@pytest.mark.parametrize("haystack", ["", " \n\n "])
def test_an_empty_haystack_is_rejected(haystack: str) -> None:
    with pytest.raises(ConfigError, match="holds no text"):
        Haystack(ByteTokenizer(), haystack)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_haystack_that_is_not_utf_8_is_rejected(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "essay.txt").write_text("Café crème. Naïve.", encoding=encoding)
    with pytest.raises(ConfigError, match=r"haystack=.*essay\.txt: is not UTF-8 \(.* at byte \d+\)\. Convert it"):
        text_haystack([tmp_path / "essay.txt"])


def test_a_missing_haystack_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        text_haystack([tmp_path / "none.txt"])
