"""Samples and documents have the tokens of their whole text, however a tokenizer treats blanks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s2train.data.inside_text import encode_inside, prepends_blank
from s2train.data.tokenizers import Tokenizer
from s2train.needles import recall
from s2train.needles.config import NeedleDocumentsConfig
from s2train.needles.documents import needle_documents
from s2train.needles.haystack import Haystack
from s2train.needles.samples import TaskSampler
from s2train.needles.tasks import find_task
from s2train.needles.words import NOISE
from tests.data.llama_tokenizers import KINDS, make_tokenizer
from tests.needles.test_tasks import VARIANTS


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(request.param, tmp_path_factory.mktemp("tokenizer"))


def is_end_of_one_piece(tokenizer: Tokenizer, ids: list[int]) -> bool:
    """Whether ids, except in the first sentence, are how the tokenizer encodes their text."""
    text = tokenizer.decode(ids)
    whole = tokenizer.encode(text)
    cut = len(tokenizer.encode(text[: text.index(".") + 1]))
    return whole[cut:] == ids[len(ids) - (len(whole) - cut) :]


def test_the_tokenizers_here_treat_blanks_as_described(tokenizer: Tokenizer) -> None:
    kind = Path(tokenizer.name).stem
    assert prepends_blank(tokenizer) == (kind != "byte-level")
    doubles = encode_inside(tokenizer, " 7.")[0] != tokenizer.encode(" 7.")  # mistral's puts none before a blank
    assert doubles == (kind == "llama-2")
    assert tokenizer.decode(tokenizer.encode("The magic number of icy-eagle is 3770464.")).endswith("is 3770464.")


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=str)
def test_a_sample_has_the_tokens_of_its_whole_text_and_its_length(
    tokenizer: Tokenizer, name: str, settings: dict[str, Any]
) -> None:
    task = find_task(name, settings)
    sampler = TaskSampler(tokenizer, task=task)
    rng = np.random.default_rng()
    for length, depth in [(700, 0.4), (901, 1.0), (640, float(rng.random()))]:
        seed = int(rng.integers(2**32))
        sample = sampler.sample(np.random.default_rng(seed), length, depth, "eval")
        ids = [*sample.prompt.tolist(), *sample.answer.tolist()]
        assert len(ids) == length
        assert is_end_of_one_piece(tokenizer, ids)
        text, puzzle = tokenizer.decode(ids), task.draft(np.random.default_rng(seed), "eval")
        assert "  " not in text
        assert text.endswith(puzzle.question + puzzle.answer)
        assert tokenizer.decode(sample.answer.tolist()).strip() == puzzle.answer.strip()
        assert sample.values == puzzle.values
        assert all(value in puzzle.answer for value in sample.values)
        for span, fact in zip(sample.spans, puzzle.needles, strict=True):
            assert tokenizer.decode(sample.prompt[slice(*span)].tolist()).strip() == "".join(fact).strip()


def test_a_needle_at_the_beginning_has_the_blank_that_the_tokenizer_prepends(tokenizer: Tokenizer) -> None:
    sample = TaskSampler(tokenizer).sample(np.random.default_rng(), 300, 0.0, "eval")
    start, stop = sample.spans[0]
    assert start == 0
    needle = tokenizer.decode(sample.prompt[:stop].tolist())
    assert sample.prompt[:stop].tolist() == tokenizer.encode(needle)
    assert "  " not in needle


def test_a_value_is_hidden_and_answered_in_the_same_tokens(tokenizer: Tokenizer) -> None:
    sampler, rng = TaskSampler(tokenizer), np.random.default_rng()
    for _ in range(20):
        sample = sampler.sample(rng, 200, float(rng.random()), "eval")
        stop = sample.spans[0][1]
        assert sample.prompt[stop - len(sample.answer) : stop].tolist() == sample.answer.tolist()


@pytest.mark.parametrize("task", ["recall", "recall_lines", "single", "key_value"])
def test_training_documents_have_the_tokens_of_their_whole_text(
    tokenizer: Tokenizer, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recall, "POOL", 1 << 11)  # facts to draw from: encoding more takes longer than the rest
    cfg = NeedleDocumentsConfig(task, documents=10, length=700)
    for document in needle_documents(cfg, tokenizer, int(np.random.default_rng().integers(1 << 30))):
        ids = document[:-1].tolist()
        assert len(ids) == 699
        assert "  " not in tokenizer.decode(ids)
        assert is_end_of_one_piece(tokenizer, ids) or "." not in tokenizer.decode(ids)


def test_text_and_tokens_are_drawn_alike(tokenizer: Tokenizer) -> None:
    haystack = Haystack(tokenizer, f"{NOISE} {'word ' * 90}end. Schön ist das. 一二三。四五！")
    for length in (0, 1, *np.random.default_rng().integers(2, 600, size=20).tolist()):
        seed = int(np.random.default_rng().integers(1 << 30))
        tokens = haystack.draw(np.random.default_rng(seed), length)
        text = haystack.draw_text(np.random.default_rng(seed), length)
        assert text.borders.tolist() == tokens.borders.tolist()
        assert len(text.sentences) == len(text.borders) - 1
        ids = encode_inside(tokenizer, "".join(text.sentences))[0] if length else []
        assert ids[len(ids) - length :] == tokens.tokens.tolist()
        before = text.more()
        longer = haystack.draw_text(np.random.default_rng(seed), len(ids) + 1)
        assert longer.sentences == [before, *text.sentences]


def test_a_tokenizer_that_merges_a_text_with_text_before_it_is_rejected() -> None:
    class Joining:
        name = "joining"

        def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
            return [1], [(0, len(text))]

    from s2train.errors import ConfigError

    with pytest.raises(ConfigError, match="tokenizer=joining: it merges the beginning of"):
        encode_inside(Joining(), " 7.")  # type: ignore[arg-type]
