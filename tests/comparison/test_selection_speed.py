"""The timing of block selection runs on a CPU, and keeps every case as it goes."""

import json
from pathlib import Path

import pytest

from s2train.comparison.selection_speed import PHASES
from tests.program import run

pytestmark = [pytest.mark.slow]
SIZES = ["--heads", "4", "--kv-heads", "2", "--dim", "16", "--block", "16", "--top-k", "3", "--budget-ms", "5"]


def test_each_scorer_is_timed_by_phase_beside_dense_attention(tmp_path: Path) -> None:
    output = tmp_path / "speed.json"
    program = "s2train.comparison.selection_speed"
    run(program, "--lengths", "256", *SIZES, "--output", str(output), processes=0).succeeded()
    data = json.loads(output.read_text())
    dense, fla, *scorers = data["cases"]
    assert dense["auto"]["ms"]["both"] > 0
    assert "absent" in fla or fla["whole"]["ms"]["both"] > 0
    assert [case["case"] for case in scorers] == ["moba", "index", "sea"]
    for case in scorers:
        assert set(PHASES) < set(case["phases_ms"])
        assert case["attention"]["ms"]["both"] > 0
        assert case["whole"]["ms"]["both"] > 0
        assert case["kept_blocks"] == pytest.approx((sum(min(row + 1, 6) for row in range(16))) / 16)
    again = run(program, "--lengths", "256", *SIZES, "--output", str(output), processes=0)
    assert "results are not overwritten" in again.err


def test_long_sequences_are_rejected_without_a_gpu() -> None:
    rejected = run("s2train.comparison.selection_speed", "--lengths", "256", "8192", processes=0)
    assert rejected.status == 2
    assert "needs a GPU for lengths above 4,096" in rejected.err
