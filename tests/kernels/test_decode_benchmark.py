"""The decoding benchmark on a CPU: what it measures, predicts and rejects."""

import json
from pathlib import Path

import pytest
import torch
from s2train.kernels.benchmarks import decode
from s2train.kernels.benchmarks.cases import parse_case
from s2train.kernels.benchmarks.decode_problem import DecodeCase, PagedStep, errors

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--masks", "b16-l2-v4", "--lengths", "96", "--batches", "2", "--heads", "4", "--dim", "16"]


def test_every_contender_is_checked_and_timed(tmp_path: Path) -> None:
    output = tmp_path / "decode.json"
    assert decode.main([*TINY, "--kv", "2", "4", "--output", str(output)]) == 0
    cases = json.loads(output.read_text())["cases"]
    assert [(case["kv_heads"], case["grouped"]) for case in cases] == [(2, False), (2, True), (4, False)]
    for case in cases:
        assert set(case["results"]) == {"sparse", "dense", "sdpa math"}
        for result in case["results"].values():
            assert result["device_ms"] > 0
            assert result["relative_error"] <= 2 * result["plain_error"]
        assert case["kv_bytes"]["sparse"] == case["kv_bytes"]["predicted"] < case["kv_bytes"]["dense"]
        assert case["largest_batch"]["dense"] <= case["largest_batch"]["hybrid"] <= case["largest_batch"]["sparse"]


@pytest.mark.parametrize("word", ["b16-l3-v5-320-h6-kv3-d16", "b32-l1-v8-256-h4-kv1-d16", "b16-l9-v2-64-h2-d16"])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_predicted_bytes_are_those_of_the_pages(word: str, grouped: bool) -> None:
    step = DecodeCase(parse_case(word), 2, grouped)
    assert PagedStep(step, step.layout(CPU), "torch", CPU).bytes_in_use == step.predicted_bytes()
    assert PagedStep(step, None, "torch", CPU).bytes_in_use == step.dense_bytes


def test_a_wrong_result_is_found() -> None:
    step = DecodeCase(parse_case("b16-l2-v4-128-h4-kv2-d16"), 2, False)
    paged = PagedStep(step, step.layout(CPU), "torch", CPU)
    error, allowed = errors(paged, 2)
    assert error <= 2 * allowed
    right, paged.layout = paged.layout, None  # every page there is, whoever keeps it
    paged.seen = lambda head: PagedStep.seen(with_layout, head)  # type: ignore[method-assign]
    with_layout = PagedStep(step, right, "torch", CPU)
    error, allowed = errors(paged, 2)
    assert error > 10 * allowed


def test_results_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "decode.json"
    output.write_text("mine")
    with pytest.raises(SystemExit):
        decode.main([*TINY, "--kv", "2", "--output", str(output)])
    assert "not overwritten" in capsys.readouterr().err
    assert output.read_text() == "mine"
