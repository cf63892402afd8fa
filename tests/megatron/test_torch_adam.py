"""torch's AdamW trains alike with and without its fused kernel, and resumes from either's checkpoint."""

from pathlib import Path
from typing import Any

import pytest
from s2train.kernels.versions import installed_version

from tests.program import metrics, pretrain, results_of

FUSED = "torch.optim.adamw.AdamW with its fused kernel"


def assert_equal_within_rounding(found: dict[str, list[dict[str, Any]]]) -> None:
    for name, continuations in found.items():
        for one in continuations:
            assert one["moved"] > 1e3 * one["tolerance"], name
            assert one["apart"] <= one["tolerance"], name
            assert one["is_exact"] or one["before"] != one["after"], name
            assert one["name"] == (FUSED if one["after"] else "torch.optim.adamw.AdamW"), name
            assert set(one["devices"]) <= {"cpu"}, name


def test_both_kernels_train_alike_and_resume_from_either() -> None:
    assert_equal_within_rounding(results_of("tests.megatron.torch_adam_program"))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(installed_version("transformer-engine") is not None, reason="Megatron takes transformer-engine's")
class TestOnAGpu:
    def test_both_kernels_train_alike_and_resume_from_either(self) -> None:
        assert_equal_within_rounding(results_of("tests.megatron.torch_adam_program"))

    @pytest.mark.parametrize("distributed", ["true", "false"])
    def test_a_run_is_fused_and_resumes_bit_for_bit(self, distributed: str, tmp_path: Path) -> None:
        own = [f"parallel.distributed_optimizer={distributed}", "train.precision=bf16", "train.deterministic=true"]
        own += ["train.steps=4", "checkpoint.interval=2"]

        def trace(folder: Path, *more: str) -> list[tuple[float, float]]:
            done = pretrain(folder, *own, *more).succeeded()
            assert f"| optimizer adam: {FUSED} |" in done.out
            return [(record["loss"], record["grad_norm"]) for record in metrics(folder)]

        whole = trace(tmp_path / "whole")
        start = tmp_path / "whole" / "checkpoints" / "iter_0000002"
        assert trace(tmp_path / "rest", f"checkpoint.resume={start}") == whole[2:]
