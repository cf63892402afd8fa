"""transformer-engine's layers around our core attention, with a stand-in for its modules in plain torch.

Names, wiring and checkpoints are tested here; its kernels and FP8 on a GPU, by launch/te_vs_local.sh.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.program import ROOT, SMALL, Outcome, metrics

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("te")]

STEPS = 6
# Two formulations of norms and Adam in fp32: the loss agrees as the parallel variants of a run do.
TOLERANCE = 1e-5


def train(kind: str, run_dir: Path, *arguments: str, processes: int = 1) -> Outcome:
    backend = "te" if kind == "fake" else "local"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        + ["-m", "tests.megatron.te_program", kind, *SMALL, f"run_dir={run_dir}", f"backend={backend}"]
        + [f"train.steps={STEPS}", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in metrics(folder)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole run of each backend, with a checkpoint after its second step."""
    folders = {}
    for kind in ("none", "fake"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        done = train(kind, folders[kind], "checkpoint.interval=2")
        assert done.status == 0, done.err
        assert f"layers {'te' if kind == 'fake' else 'local'} " in done.out
    return folders


@pytest.mark.parametrize("optimizer", ["distributed"])
@pytest.mark.parametrize(("before", "after"), [("none", "fake"), ("fake", "none"), ("fake", "fake")])
def test_a_checkpoint_of_one_backend_goes_on_in_another(
    runs: dict[str, Path], before: str, after: str, optimizer: str, tmp_path: Path
) -> None:
    done = train(after, tmp_path, f"checkpoint.resume={runs[before] / 'checkpoints' / 'iter_0000002'}")
    assert done.status == 0, done.err
    assert losses(tmp_path) == pytest.approx(losses(runs[before])[2:], rel=TOLERANCE)
