"""Held-out loss is reported by position."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from s2train.training.loss_by_position import HeldOut, position_bins, position_edges, sum_by_position
from tests.program import UNSAVED, metrics, pretrain, run

CPU = torch.device("cpu")


def test_ranges_double_up_to_the_sequence_length() -> None:
    assert position_edges(8192) == [0, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
    assert position_edges(200) == [0, 1, 3, 6, 12, 25, 50, 100, 200]
    assert position_edges(8) == [0, 1, 2, 4, 8]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_context_parallel_ranks_together_sum_what_one_process_sums(size: int) -> None:
    generator = torch.Generator().manual_seed(np.random.SeedSequence().entropy % 2**63)  # type: ignore[operator]
    length = 16 * int(torch.randint(1, 40, (), generator=generator))
    losses, weights = torch.rand(3, length, generator=generator), torch.rand(3, length, generator=generator) > 0.3
    edges = position_edges(length)
    total = torch.zeros(len(edges) - 1, 2, dtype=torch.float64)
    chunks = torch.arange(length).chunk(2 * size)
    for rank in range(size):
        held = torch.cat([chunks[rank], chunks[2 * size - 1 - rank]]) if size > 1 else torch.arange(length)
        bins = position_bins(edges, rank, size, CPU)
        total += sum_by_position(losses[:, held], weights[:, held], bins, len(edges) - 1)
    for (start, stop), (loss, tokens) in zip(itertools.pairwise(edges), total.tolist(), strict=True):
        own = weights[:, start:stop].double()
        assert tokens == own.sum()
        assert loss == pytest.approx(float((losses[:, start:stop].double() * own).sum()))


def test_short_and_long_are_token_means_over_the_first_eighth_and_the_last_half() -> None:
    length = 256
    losses = torch.rand(2, length)
    edges = position_edges(length)
    sums = sum_by_position(losses, torch.ones(2, length), position_bins(edges, 0, 1, CPU), len(edges) - 1)
    found = HeldOut.of(edges, sums)
    assert found.short == pytest.approx(losses[:, :32].double().mean().item())
    assert found.long == pytest.approx(losses[:, 128:].double().mean().item())
    assert [part[:2] for part in found.by_position][-1] == (128, 256)
    assert found.by_position[-1][2] == found.long


def test_the_loss_is_the_mean_over_tokens_of_batches_in_which_unequally_many_count() -> None:
    losses, weights, edges = torch.rand(2, 128), torch.ones(2, 128), position_edges(128)
    weights[0, 5:] = 0
    bins = position_bins(edges, 0, 1, CPU)
    by_batch = [sum_by_position(losses[i : i + 1], weights[i : i + 1], bins, len(edges) - 1) for i in range(2)]
    found = HeldOut.of(edges, by_batch[0] + by_batch[1])
    assert found.loss == pytest.approx(float((losses * weights).double().sum()) / 133)


def test_ranges_without_a_token_have_no_loss() -> None:
    edges = position_edges(128)
    weights = torch.ones(1, 128)
    weights[:, :16] = 0
    sums = sum_by_position(torch.rand(1, 128), weights, position_bins(edges, 0, 1, CPU), len(edges) - 1)
    found = HeldOut.of(edges, sums)
    assert found.short is None
    assert [loss is None for _, _, loss in found.by_position] == [True] * 5 + [False] * 3


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one process with held-out losses and a checkpoint after the first step."""
    folder = tmp_path_factory.mktemp("positions")
    pretrain(folder, *SETTINGS, "checkpoint.interval=1").succeeded()
    return folder


SETTINGS = [
    "train.steps=4",
    "train.exit_step=2",
    "evaluation.interval=1",
    "evaluation.batches=2",
    "train.precision=fp32",
]


@pytest.mark.slow
def test_a_run_reports_the_losses_of_a_direct_computation(alone: Path, tmp_path: Path) -> None:
    arguments = [str(alone / "checkpoints" / "iter_0000002"), str(tmp_path / "losses.pt")]
    run("tests.training.position_program", *arguments, processes=0).succeeded()
    losses = torch.load(tmp_path / "losses.pt").double()  # [samples, 128], by position
    (record,) = [record for record in metrics(alone) if record["step"] == 2]
    assert record["held_out_loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert record["held_out_short"] == pytest.approx(losses[:, :16].mean().item(), rel=1e-6)
    assert record["held_out_long"] == pytest.approx(losses[:, 64:].mean().item(), rel=1e-6)
    for start, stop, loss in record["held_out_loss_by_position"]:
        assert loss == pytest.approx(losses[:, start:stop].mean().item(), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [["parallel.cp=2"], [], ["parallel.pp=2"]], ids=["cp2", "dp2", "pp2"])
def test_two_processes_report_what_one_does(alone: Path, tmp_path: Path, settings: list[str]) -> None:
    start = f"checkpoint.resume={alone / 'checkpoints' / 'iter_0000001'}"
    pretrain(tmp_path, *SETTINGS, *settings, start, UNSAVED, processes=2).succeeded()
    (found,), expected = metrics(tmp_path), metrics(alone)[-1]
    assert found["held_out_long"] == pytest.approx(expected["held_out_long"], rel=1e-5)
    for (*place, loss), (*asked, right) in zip(
        found["held_out_loss_by_position"], expected["held_out_loss_by_position"], strict=True
    ):
        assert place == asked
        assert loss == pytest.approx(right, rel=1e-5)
