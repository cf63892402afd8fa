"""Needles in haystacks."""

from pathlib import Path

import numpy as np
import pytest

from s2train.data.needles import NOISE, NeedleSampler, draw_pair, text_haystack
from s2train.data.tokenizers import ByteTokenizer, load_tokenizer, train_bpe
from s2train.errors import ConfigError


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


@pytest.fixture(scope="module")
def byte_sampler() -> NeedleSampler:
    return NeedleSampler(ByteTokenizer())


def test_training_and_evaluation_share_no_key_and_no_value(rng: np.random.Generator) -> None:
    train = [draw_pair(rng, "train") for _ in range(400)]
    held_out = [draw_pair(rng, "eval") for _ in range(400)]
    for which in (0, 1):
        assert not {pair[which] for pair in train} & {pair[which] for pair in held_out}
        assert len({pair[which] for pair in held_out}) > 100


def test_pairs_follow_from_the_seed() -> None:
    first, second = ([draw_pair(np.random.default_rng(s), "eval") for s in range(9)] for _ in range(2))
    assert first == second


@pytest.mark.parametrize("depth", [0.0, 0.33, 1.0])
def test_prompt_and_answer_have_exactly_the_length_in_bytes(
    byte_sampler: NeedleSampler, rng: np.random.Generator, depth: float
) -> None:
    for length in rng.integers(96, 700, size=20):
        sample = byte_sampler.sample(rng, int(length), depth, "eval")
        assert len(sample.prompt) + len(sample.answer) == length


def test_prompt_and_answer_have_exactly_the_length_in_tokens_of_a_bpe(tmp_path: Path, rng: np.random.Generator) -> None:
    train_bpe([NOISE * 20, "The magic number of brisk-otter is 4093317. " * 20], 300, tmp_path / "tokenizer.json")
    sampler = NeedleSampler(load_tokenizer(str(tmp_path / "tokenizer.json")))
    for length in rng.integers(90, 300, size=20):
        sample = sampler.sample(rng, int(length), float(rng.random()), "eval")
        assert len(sample.prompt) + len(sample.answer) == length
        assert f"of {sample.key} is {sample.value}." in sampler.tokenizer.decode(sample.prompt.tolist())


def test_sample_asks_for_what_its_needle_says(byte_sampler: NeedleSampler, rng: np.random.Generator) -> None:
    sample = byte_sampler.sample(rng, 300, 0.5, "eval")
    prompt = byte_sampler.tokenizer.decode(sample.prompt.tolist())
    assert prompt.count(f" The magic number of {sample.key} is {sample.value}. ") == 1
    assert prompt.endswith(f" The magic number of {sample.key} is")
    assert byte_sampler.tokenizer.decode(sample.answer.tolist()) == f" {sample.value}."


def test_needle_stands_at_its_depth_between_two_sentences(
    byte_sampler: NeedleSampler, rng: np.random.Generator
) -> None:
    longest_sentence = len(" There and back again.")
    for depth in rng.random(20):
        sample = byte_sampler.sample(rng, 2000, float(depth), "eval")
        filler_length = 2000 - byte_sampler.needed_tokens(sample.key, sample.value)
        assert abs(sample.position - depth * filler_length) <= longest_sentence / 2
        before = byte_sampler.tokenizer.decode(sample.prompt[: sample.position].tolist())
        assert before == "" or before.endswith(".")


def test_needle_comes_first_at_depth_0_and_last_at_depth_1(
    byte_sampler: NeedleSampler, rng: np.random.Generator
) -> None:
    first = byte_sampler.sample(rng, 400, 0.0, "eval")
    last = byte_sampler.sample(rng, 400, 1.0, "eval")
    assert first.position == 0
    assert last.position == 400 - byte_sampler.needed_tokens(last.key, last.value)


def test_haystack_may_be_a_text_file(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "essay.txt"
    path.write_text("Call me Ishmael. Some years ago,\nnever mind how long.\n\nI went to sea!", encoding="utf-8")
    sampler = NeedleSampler(ByteTokenizer(), text_haystack([path]))
    text = sampler.tokenizer.decode(sampler.sample(rng, 500, 0.5, "eval").prompt.tolist())
    assert " Some years ago, never mind how long. " in text
    assert "grass" not in text


def test_length_too_small_for_the_needle_is_refused_with_the_least_that_works(
    byte_sampler: NeedleSampler,
) -> None:
    seed = np.random.SeedSequence().entropy
    with pytest.raises(ConfigError, match=r"lengths=40: .* Use \d+ or more") as error:
        byte_sampler.sample(np.random.default_rng(seed), 40, 0.5, "eval")
    least = int(error.value.remedy.split()[1])
    sample = byte_sampler.sample(np.random.default_rng(seed), least, 0.5, "eval")
    assert len(sample.prompt) + len(sample.answer) == least


@pytest.mark.parametrize("haystack", ["", " \n\n "])
def test_empty_haystack_is_refused(haystack: str) -> None:
    with pytest.raises(ConfigError, match="holds no text"):
        NeedleSampler(ByteTokenizer(), haystack)


def test_missing_haystack_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        text_haystack([tmp_path / "none.txt"])
