"""Needle tasks compose samples of exact length with needles and answers."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s2train.data.tokenizers import ByteTokenizer, load_tokenizer, train_bpe
from s2train.errors import ConfigError
from s2train.needles.samples import TaskSample, TaskSampler
from s2train.needles.tasks import TASKS, Puzzle, find_task, has_setting
from s2train.needles.words import NOISE, split_of, text_haystack

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("single", {}),
    ("multi", {}),
    ("multi", {"needles": 3, "ask": "all"}),
    ("key_value", {}),
    ("key_value", {"distractors": 7}),
    ("variable_tracking", {}),
    ("variable_tracking", {"hops": 2, "chains": 3, "ask": "one"}),
]
TOKENIZER = ByteTokenizer()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def sampler(name: str, settings: dict[str, Any]) -> TaskSampler:
    return TaskSampler(TOKENIZER, task=find_task(name, settings))


def draft(name: str, rng: np.random.Generator, **settings: Any) -> Puzzle:
    return find_task(name, settings).draft(rng, "eval")


def texts(sample: TaskSample) -> tuple[str, str, list[str]]:
    """Prompt, answer and needles."""
    needles = [TOKENIZER.decode(sample.prompt[slice(*span)].tolist()) for span in sample.spans]
    return TOKENIZER.decode(sample.prompt.tolist()), TOKENIZER.decode(sample.answer.tolist()), needles


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=str)
def test_a_sample_has_its_exact_length_and_its_needles_at_their_spans(
    name: str, settings: dict[str, Any], rng: np.random.Generator
) -> None:
    task = find_task(name, settings)
    for _ in range(20):
        length, depth, seed = int(rng.integers(500, 900)), float(rng.random()), int(rng.integers(2**32))
        sample = sampler(name, settings).sample(np.random.default_rng(seed), length, depth, "eval")
        assert len(sample.prompt) + len(sample.answer) == length
        puzzle = task.draft(np.random.default_rng(seed), "eval")
        prompt, answer, needles = texts(sample)
        assert needles == ["".join(fact) for fact in puzzle.needles]
        assert prompt.endswith(puzzle.question)
        assert answer == puzzle.answer
        for fact in (*puzzle.needles, *puzzle.distractors):
            assert prompt.count("".join(fact)) == 1


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=str)
def test_the_first_needle_is_at_its_depth(name: str, settings: dict[str, Any], rng: np.random.Generator) -> None:
    made = sampler(name, settings)
    for depth in (0.0, 0.4, 1.0):
        sample = made.sample(rng, 4000, depth, "eval")
        start, stop = sample.spans[0]
        prompt, _, needles = texts(sample)
        if depth == 0:
            assert start == 0
        elif depth == 1:
            rest = "".join(needles[1:])
            assert re.search(re.escape(needles[0] + (rest if name == "variable_tracking" else "")), prompt[start:])
            if name != "variable_tracking":
                assert "." not in prompt[stop:]  # nothing but the question comes after it
        else:
            assert 0.25 * 4000 < start < 0.55 * 4000


def test_the_other_needles_of_a_chain_come_after_the_first_in_order(rng: np.random.Generator) -> None:
    for _ in range(20):
        sample = sampler("variable_tracking", {}).sample(rng, 700, float(rng.random()), "eval")
        assert len(sample.spans) == 5
        assert all(stop <= start for (_, stop), (start, _) in zip(sample.spans, sample.spans[1:], strict=False))


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=str)
def test_all_keys_values_and_names_are_of_the_split(
    name: str, settings: dict[str, Any], rng: np.random.Generator
) -> None:
    for split in ("train", "eval"):
        for _ in range(10):
            prompt, answer, _ = texts(sampler(name, settings).sample(rng, 900, 0.5, split))
            start = prompt.index(".") + 1  # the first sentence may be incomplete
            # for a line's key, the words before its number
            words = re.findall(r"[a-z]+-[a-z]+\b|\b\d{7}\b|\b[A-Z]{3}\b", prompt[start:] + answer)
            assert len(words) >= 4
            assert {split_of(word) for word in words} == {split}


def test_multi_asks_for_one_needle_or_for_all(rng: np.random.Generator) -> None:
    one, every = draft("multi", rng, needles=5), draft("multi", rng, needles=5, ask="all")
    assert (len(one.needles), len(one.distractors)) == (1, 4)
    assert one.question + one.answer == "".join(one.needles[0])
    assert (len(every.needles), len(every.distractors)) == (5, 0)
    keys = [fact[0].removeprefix(" The magic number of ").removesuffix(" is") for fact in every.needles]
    assert len(set(keys)) == 5
    assert every.question == f" The magic numbers of {', '.join(keys)} are"
    assert every.answer == " " + ", ".join(fact[1].strip(" .") for fact in every.needles) + "."


def test_a_key_value_haystack_is_lines_only_or_has_the_requested_number(rng: np.random.Generator) -> None:
    line = re.compile(r" [a-z]+-[a-z]+-\d{3}: \d{7}\.")
    prompt, _, needles = texts(sampler("key_value", {}).sample(rng, 3000, 0.5, "eval"))
    body = prompt[prompt.index(".") + 1 : prompt.rindex(".") + 1]  # the first line may be incomplete
    assert line.sub("", body) == ""
    assert len(line.findall(body)) > 100
    key = needles[0].split(":")[0]
    assert prompt.count(f"{key}:") == 2  # the needle and the question
    prompt, _, _ = texts(sampler("key_value", {"distractors": 9}).sample(rng, 3000, 0.5, "eval"))
    assert len(line.findall(prompt)) == 10
    assert "The grass is green." in prompt


def test_a_chain_leads_from_its_value_through_all_names(rng: np.random.Generator) -> None:
    puzzle = draft("variable_tracking", rng, hops=3, chains=2)
    known = dict(re.fullmatch(r" (\w+) = (\w+)\.", "".join(fact)).groups() for fact in puzzle.needles)  # type: ignore[union-attr]
    names = list(known)
    value = known[names[0]]
    assert re.fullmatch(r"\d{7}", value)
    assert [known[name] for name in names[1:]] == names[:-1]
    assert (puzzle.question, puzzle.answer) == (f" Names of {value}:", f" {', '.join(names)}.")
    assert len(names) == 4
    assert len(puzzle.distractors) == 4
    assert not any(name in "".join(fact) for fact in puzzle.distractors for name in (*names, value))
    last = draft("variable_tracking", rng, ask="one")
    assert last.question == f" {last.needles[-1][0].split()[0]} stands for"
    assert last.answer == last.needles[0][1]


def test_samples_depend_on_the_seed_alone() -> None:
    for name, settings in VARIANTS:
        first, second = (sampler(name, settings).sample(np.random.default_rng(7), 800, 0.3, "eval") for _ in range(2))
        assert first.prompt.tolist() == second.prompt.tolist()
        assert first.spans == second.spans


def test_a_needles_value_has_the_tokens_of_the_answer_with_a_bpe(tmp_path: Path, rng: np.random.Generator) -> None:
    train_bpe([NOISE * 20, "The magic number of brisk-otter is 4093317. " * 20], 300, tmp_path / "tokenizer.json")
    made = TaskSampler(load_tokenizer(str(tmp_path / "tokenizer.json")))
    for _ in range(20):
        sample = made.sample(rng, 200, float(rng.random()), "eval")
        assert len(sample.prompt) + len(sample.answer) == 200
        stop = sample.spans[0][1]
        assert sample.prompt[stop - len(sample.answer) : stop].tolist() == sample.answer.tolist()


def test_haystacks_are_read_from_text_files(tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "essay.txt").write_text("Call me Ishmael. Some years ago,\nnever mind how long.\n\nI went to sea!")
    made = TaskSampler(TOKENIZER, text_haystack([tmp_path / "essay.txt"]), find_task("variable_tracking", {}))
    prompt, _, _ = texts(made.sample(rng, 900, 0.5, "eval"))
    assert " Some years ago, never mind how long. " in prompt
    assert "grass" not in prompt


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=str)
def test_a_length_too_small_is_rejected_with_the_smallest_that_works(name: str, settings: dict[str, Any]) -> None:
    seed = np.random.SeedSequence().entropy
    made = sampler(name, settings)
    with pytest.raises(ConfigError, match=r"lengths=20: .* Use \d+ or more") as error:
        made.sample(np.random.default_rng(seed), 20, 0.5, "eval")
    least = made.needed_tokens(np.random.default_rng(seed), "eval")
    assert error.value.remedy.startswith(f"Use {least} or more")
    sample = made.sample(np.random.default_rng(seed), least, 0.5, "eval")
    assert len(sample.prompt) + len(sample.answer) == least


def test_an_unknown_task_is_rejected_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"task=keyvalue: no such task. Did you mean key_value\?"):
        find_task("keyvalue", {})


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("single", "needles", 2),
        ("multi", "hops", 2),
        ("multi", "needles", 0),
        ("multi", "needles", 101),
        ("multi", "ask", "some"),
        ("key_value", "distractors", -1),
        ("variable_tracking", "hops", 0),
        ("variable_tracking", "chains", 0),
        ("variable_tracking", "ask", ""),
    ],
)
def test_settings_that_a_task_lacks_or_that_cannot_work_are_rejected(name: str, setting: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        find_task(name, {setting: value})
    assert error.value.setting == setting


def test_unset_settings_have_their_defaults() -> None:
    for name in TASKS:
        assert find_task(name, {"ask": None, "hops": None}) == find_task(name, {})
        assert all(has_setting(name, setting) for setting in asdict(find_task(name, {})))  # type: ignore[call-overload]
