"""On a GPU, an optimizer that works in the host's memory in part trains alike, and resumes bit for bit."""

from pathlib import Path

import pytest
from s2train.kernels.versions import installed_version

from tests.program import metrics, pretrain, run

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.mark.skipif(installed_version("transformer-engine") is None, reason="transformer-engine isn't installed")
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_an_offloaded_run_resumes_bit_for_bit_and_trains_as_without(share: float, tmp_path: Path) -> None:
    own = ["train.precision=bf16", "train.steps=6", "checkpoint.interval=2", "train.deterministic=true"]

    def losses(name: str, *more: str) -> list[float]:
        pretrain(tmp_path / name, *own, *more).succeeded()
        return [record["loss"] for record in metrics(tmp_path / name)]

    offload = f"optim.cpu_offload={share}"
    whole = losses("whole", offload)
    start = f"checkpoint.resume={tmp_path / 'whole' / 'checkpoints' / 'iter_0000002'}"
    assert losses("parts", offload, start) == whole[2:]  # its fourth step is the first to show a wrong step count
    assert whole == pytest.approx(losses("plain"), rel=2e-3)  # Adam in another kernel; bf16 weights
    text = tmp_path / "text.txt"
    text.write_text("A program without such an optimizer loads its checkpoints too.\n" * 8)
    run(
        "evaluate.py", f"checkpoint={tmp_path / 'whole'}", f"text=[{text}]", f"output={tmp_path / 'loss.json'}"
    ).succeeded()
