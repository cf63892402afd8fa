import numpy as np
import pytest
import torch
from torch import Tensor

from s2train.data.tokenizers import ByteTokenizer
from s2train.probes.completion import NEAREST, Completion, find_completions, score
from s2train.probes.documents import Document
from tests.inference.uncached import greedy_decode
from tests.needles.fake_models import copier
from tests.probes.source_text import source

LENGTH = 512
BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return [Document.of(source(seed, 60, 6), BYTES) for seed in (1, 2)]


@pytest.fixture(scope="module")
def found(documents: list[Document]) -> list[Completion]:
    return find_completions(documents, LENGTH, 20, seed=3)


def test_prompt_and_answer_are_as_long_as_asked_and_end_with_the_name(found: list[Completion]) -> None:
    assert len(found) == 20
    for one in found:
        assert len(one.prompt) + len(one.answer) == LENGTH
        assert BYTES.decode([*one.prompt, *one.answer]).endswith(one.name)
        assert NEAREST * LENGTH <= one.distance < LENGTH


def test_the_definition_is_the_only_other_occurrence(found: list[Completion]) -> None:
    for one in found:
        prompt = BYTES.decode(one.prompt.tolist())
        assert prompt.count(one.name) == 1
        assert f"static int {one.name}(void)\n" in prompt


def test_the_control_is_as_long_and_lacks_the_definition(found: list[Completion]) -> None:
    for one in found:
        control = BYTES.decode(one.control.tolist())
        assert len(one.control) == len(one.prompt)
        assert one.name not in control
        assert control.endswith(BYTES.decode(one.prompt[-100:].tolist()))


def test_another_name_that_begins_alike_leaves_a_completion_out() -> None:
    text = source(4, 60, 6)
    alike = find_completions([Document.of(text, BYTES)], LENGTH, 1000, seed=3)
    target = alike[0].name
    twin = text.replace(f"static int {target}(", f"static int {target[:6]}zzzzzzz(void)\nstatic int {target}(", 1)
    others = find_completions([Document.of(twin, BYTES)], LENGTH, 1000, seed=3)
    assert target not in {one.name for one in others}


def test_the_choice_follows_from_the_seed(documents: list[Document], found: list[Completion]) -> None:
    names = [one.name for one in found]
    assert [one.name for one in find_completions(documents, LENGTH, 20, seed=3)] == names
    assert [one.name for one in find_completions(documents, LENGTH, 20, seed=4)] != names


def test_a_model_that_copies_completes_with_the_definition_alone(found: list[Completion]) -> None:
    def decode(prompts: Tensor, new_tokens: int) -> Tensor:
        return greedy_decode(lambda *inputs: copier(*inputs, suffix=5), prompts, new_tokens)

    given, control = score(decode, found, batch_size=8, device=torch.device("cpu"))
    assert (given.correct, given.trials) == (20, 20)
    assert control.correct == 0


def test_answers_of_different_lengths_are_decoded_apart() -> None:
    def make(length: int) -> Completion:
        ids = np.arange(16 - length)
        return Completion("name", ids, ids, np.full(length, 7), 9)

    def decode(prompts: Tensor, new_tokens: int) -> Tensor:
        assert prompts.shape[1] + new_tokens == 16
        return torch.full((len(prompts), new_tokens), 7)

    given, _ = score(decode, [make(2), make(3), make(2)], batch_size=8, device=torch.device("cpu"))
    assert given.correct == 3
