"""Every way to spread the model over processes trains it alike: same losses, same gradient norms.

All variants start from one checkpoint of a single process, so that resharding it is tested along the way.
"""

from pathlib import Path

import pytest

from tests.program import metrics, pretrain

STEPS = 10
TOLERANCE = 1e-5

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("parity")]

VARIANTS = {
    "tp2": (2, ["parallel.tp=2"]),
    "tp2 with sequence parallel": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "pp2": (2, ["parallel.pp=2"]),
    "vpp2": (2, ["parallel.pp=2", "parallel.vpp=2"]),
    "dp2": (2, ["parallel.overlap_grad_reduce=false"]),
    "dp2 with overlap": (2, []),
    "cp2": (2, ["parallel.cp=2"]),
    "full recomputation": (1, ["train.recompute=full"]),
    "selective recomputation": (1, ["train.recompute=selective"]),
    "tp2 cp2": (4, ["parallel.tp=2", "parallel.cp=2", "parallel.sequence_parallel=true"]),
}


@pytest.fixture(scope="module", params=[True, False], ids=["distributed optimizer", "plain optimizer"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of one process: a checkpoint after its first step, and ten steps on from there."""
    folder = tmp_path_factory.mktemp("one_process")
    settings = [f"parallel.distributed_optimizer={str(request.param).lower()}", f"train.steps={STEPS + 1}"]
    for exit_step in (1, STEPS + 1):
        done = pretrain(folder, *settings, f"train.exit_step={exit_step}")
        assert done.status == 0, done.err
    return folder, settings


def trace(folder: Path) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in metrics(folder)][-STEPS:]


@pytest.mark.parametrize("variant", VARIANTS)
def test_trains_as_one_process_does(reference: tuple[Path, list[str]], variant: str, tmp_path: Path) -> None:
    folder, settings = reference
    processes, arguments = VARIANTS[variant]
    checkpoint = folder / "checkpoints" / "iter_0000001"
    done = pretrain(tmp_path, *settings, *arguments, f"checkpoint.resume={checkpoint}", processes=processes)
    assert done.status == 0, done.err
    found, expected = trace(tmp_path), trace(folder)
    assert len(found) == len(expected) == STEPS
    for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
        assert norm == pytest.approx(expected_norm, rel=TOLERANCE)
