"""transformer-engine's layers around our core attention, with a stand-in for its modules in plain torch.

Names, wiring and checkpoints are tested here; its kernels and FP8 on a GPU, by launch/te_vs_local.sh.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from tests.forked import FAKE_TE
from tests.program import SMALL, UNSAVED, Outcome, metrics, run

pytestmark = [pytest.mark.slow]

STEPS = 4
# Two formulations of norms and Adam in fp32: the loss agrees as the parallel variants of a run do.
TOLERANCE = 1e-5
OPTIMIZERS = {"distributed": [], "plain": ["parallel.distributed_optimizer=false"]}


def train(kind: str, run_dir: Path, *arguments: str) -> Outcome:
    """Norms of queries and keys are modules of their own, with one name in both backends."""
    backend = "te" if kind == "fake" else "local"
    settings = [*SMALL, f"run_dir={run_dir}", f"layer_backend={backend}", f"train.steps={STEPS}", "model.qk_norm=true"]
    settings += arguments
    # Megatron looks for transformer-engine as it is imported.
    with mock.patch.dict(os.environ, {FAKE_TE: str(int(kind == "fake"))}):
        return run("tests.megatron.te_program", *settings, processes=0)


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in metrics(folder)]


Runs = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A whole run of a backend with an optimizer, with a checkpoint after its second step; each is made once."""

    @functools.cache
    def made(kind: str, optimizer: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        done = train(kind, folder, *OPTIMIZERS[optimizer], "checkpoint.interval=2").succeeded()
        assert f"layers {'te' if kind == 'fake' else 'local'} " in done.out
        adam = "tests.megatron.fake_transformer_engine.FusedAdam" if kind == "fake" else "torch.optim.adamw.AdamW"
        assert f"| optimizer adam: {adam} |" in done.out
        return folder

    return made


@pytest.mark.parametrize(
    ("before", "after", "optimizer"),
    [
        ("none", "fake", "distributed"),
        ("fake", "none", "distributed"),
        pytest.param("fake", "fake", "plain", marks=pytest.mark.long),
        pytest.param("fake", "fake", "distributed", marks=pytest.mark.long),
        pytest.param("none", "fake", "plain", marks=pytest.mark.long),
        pytest.param("fake", "none", "plain", marks=pytest.mark.long),
    ],
)
def test_a_checkpoint_of_one_backend_goes_on_in_another(
    run_of: Runs, before: str, after: str, optimizer: str, tmp_path: Path
) -> None:
    start = run_of(before, optimizer) / "checkpoints" / "iter_0000002"
    train(after, tmp_path, *OPTIMIZERS[optimizer], UNSAVED, f"checkpoint.resume={start}").succeeded()
    assert losses(tmp_path) == pytest.approx(losses(run_of(before, optimizer))[2:], rel=TOLERANCE)


def test_both_backends_train_alike(run_of: Runs) -> None:
    assert losses(run_of("fake", "distributed")) == pytest.approx(losses(run_of("none", "distributed")), rel=TOLERANCE)


def test_recomputing_the_mlp_changes_no_loss(run_of: Runs, tmp_path: Path) -> None:
    train("fake", tmp_path, "train.recompute=mlp", UNSAVED).succeeded()
    assert losses(tmp_path) == pytest.approx(losses(run_of("fake", "distributed")), rel=TOLERANCE)


def test_block_selection_trains_alike_on_both_backends(tmp_path: Path) -> None:
    selection = ["layout.layers=DE", "+layout.kinds.E={kind:block_selection,scorer:index,top_k:1,warm_up_steps:2}"]
    for kind in ("fake", "none"):
        train(kind, tmp_path / kind, UNSAVED, *selection).succeeded()
    assert losses(tmp_path / "fake") == pytest.approx(losses(tmp_path / "none"), rel=TOLERANCE)


@pytest.mark.slow
def test_a_dense_teacher_teaches_alike_on_both_backends(tmp_path: Path) -> None:
    train("none", tmp_path / "dense", "layout.layers=D").succeeded()
    own = f"scorer:index,top_k:1,warm_up_steps:2,teacher:{tmp_path / 'dense'}"
    for kind in ("fake", "none"):
        train(
            kind, tmp_path / kind, UNSAVED, "layout.layers=DE", f"+layout.kinds.E={{kind:block_selection,{own}}}"
        ).succeeded()
    for column in ("loss", "block_selection_kl", "block_selection_recall"):
        found, expected = ([record[column] for record in metrics(tmp_path / kind)] for kind in ("fake", "none"))
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=1e-8), column
