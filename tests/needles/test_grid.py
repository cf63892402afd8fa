"""Retrieval is evaluated over length × depth."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from s2train.data.tokenizers import ByteTokenizer
from s2train.errors import ConfigError
from s2train.needles.config import NeedleConfig
from s2train.needles.results import Cell
from s2train.needles.retrieval import NeedleGrid, Ranks, choose_grid, evaluate_grid
from s2train.needles.samples import TaskSampler
from s2train.needles.tasks import find_task
from tests.inference.uncached import LanguageModel, greedy_decode
from tests.needles.fake_models import copier, parrot, short_sighted_copier, solve

CPU = torch.device("cpu")
GRID = NeedleGrid(lengths=(160, 256), depths=(0.0, 0.5, 1.0), trials=3, seed=11)


@pytest.fixture(scope="module")
def sampler() -> TaskSampler:
    return TaskSampler(ByteTokenizer())


def evaluate(model: LanguageModel, sampler: TaskSampler, grid: NeedleGrid = GRID, **options: Any) -> list[Cell]:
    decode = partial(greedy_decode, model)
    return list(evaluate_grid(decode, sampler, grid, batch_size=2, device=CPU, **options))


def test_a_model_that_copies_the_needle_scores_everywhere(sampler: TaskSampler) -> None:
    cells = evaluate(copier, sampler)
    assert [(cell.length, cell.depth) for cell in cells] == GRID.cells
    assert all(cell.correct == cell.trials == 3 and cell.token_accuracy == 1 for cell in cells)


def test_a_model_that_never_copies_scores_nowhere(sampler: TaskSampler) -> None:
    assert all(cell.correct == 0 and cell.token_accuracy == 0 for cell in evaluate(parrot, sampler))


def test_a_model_that_sees_only_the_end_finds_only_the_deepest_needle(sampler: TaskSampler) -> None:
    grid = NeedleGrid(lengths=(320,), depths=(0.0, 0.5, 1.0), trials=3, seed=1)
    assert [cell.correct for cell in evaluate(short_sighted_copier, sampler, grid)] == [0, 0, 3]


def test_a_half_correct_answer_counts_for_tokens_and_not_as_exact(sampler: TaskSampler) -> None:
    def decode(prompts: Tensor, new_tokens: int) -> Tensor:
        answer = greedy_decode(copier, prompts, new_tokens)
        answer[:, 6:] = 0  # 6 of " 1234567."
        return answer

    cells = list(evaluate_grid(decode, sampler, GRID, batch_size=8, device=CPU))
    assert all(cell.correct == 0 and cell.token_accuracy == pytest.approx(6 / 9) for cell in cells)


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("single", {}),
        ("multi", {}),
        ("multi", {"ask": "all"}),
        ("key_value", {}),
        ("key_value", {"distractors": 5}),
        ("variable_tracking", {}),
        ("variable_tracking", {"ask": "one", "chains": 2}),
    ],
    ids=str,
)
def test_a_solver_scores_everywhere_in_every_task_and_one_mistake_is_counted(
    task: str, settings: dict[str, Any]
) -> None:
    sampler = TaskSampler(ByteTokenizer(), task=find_task(task, settings))
    grid = NeedleGrid(lengths=(512, 700), depths=(0.0, 0.5, 1.0), trials=3, seed=11)
    cells = list(evaluate_grid(solve, sampler, grid, batch_size=2, device=CPU))
    assert [cell.correct for cell in cells] == [3] * 6
    assert {(cell.token_accuracy, cell.character_accuracy) for cell in cells} == {(1.0, 1.0)}
    calls = 0

    def wrong_once(prompts: Tensor, new_tokens: int) -> Tensor:
        nonlocal calls
        calls += 1
        answers = solve(prompts, new_tokens)
        if calls == 1:
            answers[0, 1] = 200  # an invalid byte instead of the first letter or digit
        return answers

    first, *others = evaluate_grid(wrong_once, sampler, grid, batch_size=2, device=CPU)
    assert (first.correct, [cell.correct for cell in others]) == (2, [3] * 5)
    sample = sampler.sample(grid.rng(512, 0.0, 0), 512, 0.0, "eval")
    counted = sum(character.isalnum() for character in sampler.tokenizer.decode(sample.answer.tolist()))
    assert first.token_accuracy == pytest.approx(1 - 1 / (3 * len(sample.answer)))
    assert first.character_accuracy == pytest.approx(1 - 1 / (3 * counted))


def test_a_value_in_other_words_is_contained_and_not_exact(sampler: TaskSampler) -> None:
    """Other words around the value don't matter; words after the end of the document don't count."""

    def decode(prompts: Tensor, new_tokens: int) -> Tensor:
        answers = greedy_decode(copier, prompts, 9)
        said = [b": " + bytes(answer)[1:8] for answer in answers.tolist()]
        said[0] = said[0][:4] + bytes([ByteTokenizer.eod - 1]) + said[0][4:]
        rows = [list(text.ljust(new_tokens)) for text in said]
        rows[0] = [ByteTokenizer.eod if token == ByteTokenizer.eod - 1 else token for token in rows[0]]
        return torch.tensor(rows)[:, :new_tokens]

    (cell,) = evaluate_grid(
        decode, sampler, NeedleGrid((200,), (0.5,), 4, seed=1), batch_size=4, device=CPU, extra_tokens=3
    )
    assert (cell.correct, cell.values_found, cell.values) == (0, 3, 4)


def test_each_value_of_an_answer_counts_separately() -> None:
    sampler = TaskSampler(ByteTokenizer(), task=find_task("multi", {"needles": 3, "ask": "all"}))

    def decode(prompts: Tensor, new_tokens: int) -> Tensor:
        answers = solve(prompts, new_tokens)
        answers[:, :8] = ord("-")  # the first of three numbers
        return answers

    (cell,) = evaluate_grid(decode, sampler, NeedleGrid((512,), (0.5,), 2, seed=1), batch_size=2, device=CPU)
    assert (cell.correct, cell.trials, cell.values_found, cell.values) == (0, 2, 4, 6)


def test_longer_sequences_are_decoded_in_smaller_batches(sampler: TaskSampler) -> None:
    taken: dict[int, set[int]] = {}

    def decode(prompts: Tensor, new_tokens: int) -> Tensor:
        taken.setdefault(prompts.shape[1] + new_tokens, set()).add(prompts.shape[0])
        return greedy_decode(copier, prompts, new_tokens)

    grid = NeedleGrid(lengths=(100, 160, 320), depths=(0.5,), trials=4, seed=1)
    list(evaluate_grid(decode, sampler, grid, batch_size=3, batch_tokens=300, device=CPU))
    assert taken == {100: {3, 1}, 160: {1}, 320: {1}}


def test_trials_of_a_cell_vary_around_its_depth(sampler: TaskSampler) -> None:
    seed = int(np.random.default_rng().integers(1 << 30))
    grid = NeedleGrid(lengths=(4096,), depths=(0.0, 0.5, 1.0), trials=80, seed=seed, jitter=0.05)
    for depth in grid.depths:
        starts = [grid.sample(sampler, 4096, depth, trial).spans[0][0] / 4096 for trial in range(80)]
        assert starts == [grid.sample(sampler, 4096, depth, trial).spans[0][0] / 4096 for trial in range(80)]
        # Half of the trials near an end are at it; all 80 share two of its four places with a chance below 1e-9.
        assert len({round(start * 4096 / 64) for start in starts}) > 2
        assert max(abs(start - depth) for start in starts) < 0.05 + 0.06  # the question, half a sentence
    still = replace(grid, jitter=0.0)
    assert len({still.sample(sampler, 4096, 0.0, trial).spans[0][0] for trial in range(20)}) == 1


def test_batch_size_changes_no_result(sampler: TaskSampler) -> None:
    decode = partial(greedy_decode, short_sighted_copier)
    results = [list(evaluate_grid(decode, sampler, GRID, batch_size=b, device=CPU)) for b in (1, 2, 5)]
    assert results[0] == results[1] == results[2]


def test_finished_cells_are_yielded_unchanged(sampler: TaskSampler) -> None:
    known = Cell(160, 0.5, correct=1, trials=3, token_accuracy=0.25, character_accuracy=0.25)
    cells = evaluate(copier, sampler, finished={(160, 0.5): known})
    assert cells[1] == known
    assert all(cell.correct == 3 for cell in cells if cell is not known)


def _evaluate_as_rank(rank: int, world: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=world)
    seen = []

    def decode(prompts: Tensor, new_tokens: int) -> Tensor:
        seen.append(len(prompts))
        return greedy_decode(short_sighted_copier, prompts, new_tokens)

    def solve_some(prompts: Tensor, new_tokens: int) -> Tensor:
        return torch.where(prompts[:, :1] % 2 == 0, solve(prompts, new_tokens), 0)

    grid = NeedleGrid(lengths=(320,), depths=(0.0, 1.0), trials=3, seed=1)
    options: dict[str, Any] = {"batch_size": 4, "device": CPU, "ranks": Ranks(rank, world)}
    cells = list(evaluate_grid(decode, TaskSampler(ByteTokenizer()), grid, **options))
    chains = TaskSampler(ByteTokenizer(), task=find_task("variable_tracking", {}))
    more = list(evaluate_grid(solve_some, chains, grid, **options))
    torch.save((cells, more, sum(seen)), f"{path}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_share_the_trials_and_agree_on_the_counts(sampler: TaskSampler, tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_evaluate_as_rank, (2, str(tmp_path)), nprocs=2, start_method="fork")
    (tmp_path / "alone").mkdir()
    alone_at = str(tmp_path / "alone")
    torch.multiprocessing.start_processes(_evaluate_as_rank, (1, alone_at), nprocs=1, start_method="fork")
    alone = torch.load(tmp_path / "alone" / "0.pt", weights_only=False)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first[:2] == second[:2] == alone[:2]
    done_by_first, done_by_second = first[2], second[2]
    assert (done_by_first, done_by_second) == (4, 2)  # 2 and 1 of 3 trials, in 2 cells


@pytest.mark.parametrize(
    ("setting", "changed"),
    [
        ("lengths", {"lengths": ()}),
        ("lengths", {"lengths": (256, -1)}),
        ("lengths", {"lengths": (256, 256)}),
        ("depths", {"depths": (0.5, 1.5)}),
        ("depths", {"depths": ()}),
        ("trials", {"trials": 0}),
        ("depth_jitter", {"jitter": 0.6}),
    ],
)
def test_a_grid_that_cannot_work_is_rejected(setting: str, changed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        replace(NeedleGrid(lengths=(256,), depths=(0.5,), trials=1, seed=0), **changed)
    assert error.value.setting == setting


def test_default_lengths_are_the_quarters_of_the_trained_length_that_fit_a_needle(sampler: TaskSampler) -> None:
    cfg = NeedleConfig(checkpoint="run")
    assert choose_grid(cfg, 1024, sampler).lengths == (256, 512, 768, 1024)
    assert choose_grid(cfg, 256, sampler).lengths == (128, 192, 256)


def test_requested_lengths_are_used(sampler: TaskSampler) -> None:
    assert choose_grid(NeedleConfig(checkpoint="run", lengths=[300, 200]), 128, sampler).lengths == (300, 200)
