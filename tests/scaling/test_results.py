"""Results are computed correctly from the runs' metrics."""

from typing import Any

import numpy as np
import pytest
import torch

from s2train.scaling.balance import spread
from s2train.scaling.jobs import Outcome
from s2train.scaling.parity import compare_losses
from s2train.scaling.report import disagrees, is_done, lines
from s2train.scaling.resumption import STEPS, STOP, compare_reports, find_differences
from s2train.scaling.speed import summary


def run(*losses: float) -> Outcome:
    return Outcome([{"event": "config"}, *({"loss": loss} for loss in losses)], None, 1.0)


FAILED = Outcome([], "out of memory", 1.0)


def compare(variant: Outcome) -> dict[str, Any]:
    outcomes = {"one": run(4.0, 2.0), "rounding run": run(4.0, 2.002), "tp2": variant}
    return compare_losses(outcomes, ["rounding run"], ["tp2"])


def test_losses_may_deviate_by_twice_the_rounding() -> None:
    result = compare(run(4.0, 2.0039))
    assert result["tolerance"] == pytest.approx(0.002)
    assert result["deviation"]["tp2"] == pytest.approx(0.00195)
    assert result["agrees"]
    assert not compare(run(4.0, 2.0041))["agrees"]


def test_a_deviation_at_any_step_counts() -> None:
    assert not compare(run(4.1, 2.0))["agrees"]


def test_a_failed_variant_does_not_agree() -> None:
    result = compare(FAILED)
    assert result["errors"] == {"tp2": "out of memory"}
    assert not result["agrees"]


def test_a_loss_that_is_not_finite_does_not_agree() -> None:
    result = compare(Outcome([{"loss": 4.0}, {"loss": None}], None, 1.0))
    assert result["errors"] == {"tp2": "a loss is not finite"}
    assert not result["agrees"]


def test_nothing_agrees_with_a_failed_reference() -> None:
    result = compare_losses({"one": FAILED, "rounding run": run(1.0), "tp2": run(1.0)}, ["rounding run"], ["tp2"])
    assert not result["agrees"]
    assert "deviation" not in result


def step(number: int, tokens_per_s: float) -> dict[str, Any]:
    return {"step": number, "loss": 1.0, "tokens_per_s": tokens_per_s, "step_time_s": 1.0}


def test_speed_leaves_out_first_and_profiled_steps() -> None:
    rates = [1.0, 1.0, 1.0, 90.0, 100.0, 110.0, 6.0, 5.0]
    records = [step(number, rate) for number, rate in enumerate(rates, 1)]
    parts = {"linear layers": 6.0, "communication": 1.0, "communication beside compute": 1.5}
    profiled = {"event": "profile", "traced": [8], "step_ms": 10.0, "parts": parts}
    peak = {"event": "memory", "planned_gib": 7.0, "peak_gib": 6.5}
    row = summary(Outcome([*records, peak, profiled], None, 1.0), 2, alone=80.0)
    assert row["tokens_per_s"] == 100.0
    assert row["efficiency"] == pytest.approx(100 / 160)
    assert (row["communication_exposed"], row["communication_hidden"]) == (0.1, 0.15)
    assert (row["memory_gib"], row["planned_gib"]) == (6.5, 7.0)
    assert row["mfu"] is None


def test_a_failed_run_is_reported_with_its_error() -> None:
    result = {"models": {"1b": {"one": summary(FAILED, 1, None)}}}
    assert lines("scaling", result) == ["1b one: out of memory"]


def test_the_spread_is_the_excess_of_the_slowest_rank_over_the_mean() -> None:
    assert spread([1.0, 1.0, 1.0]) == 0
    assert spread([1.0, 3.0]) == pytest.approx(0.5)


def reports(first: int, **changed: float) -> Outcome:
    same = {"loss": 2.0, "grad_norm": 1.0, "lr": 0.1}
    steps = range(first, STEPS + 1)
    records = [
        {"step": step, "step_time_s": float(first), **same, **(changed if step == STEPS else {})} for step in steps
    ]
    return Outcome([{"event": "config"}, *records], None, 1.0)


def test_a_resumed_run_may_differ_only_in_times() -> None:
    assert compare_reports(reports(1), reports(STOP + 1))["agrees"]
    found = compare_reports(reports(1), reports(STOP + 1, grad_norm=1.0 + 2**-52))
    assert found["different_steps"] == [STEPS]
    assert not found["agrees"]


def test_a_resumed_run_that_failed_or_lacks_a_step_does_not_agree() -> None:
    assert not compare_reports(reports(1), FAILED)["agrees"]
    assert compare_reports(reports(1), reports(STOP + 2))["different_steps"] == [STOP + 1]


@pytest.mark.parametrize(
    "changed",
    [
        {"weight": torch.tensor([1.0, -0.0])},
        {"weight": torch.tensor([1.0, 0.0], dtype=torch.float64)},
        {"generator": [{"numpy": ("MT19937", np.arange(624) + (np.arange(624) == 300))}]},
        {"common.pt": {"optimizer": [{"step": 11}]}},
        {"more": 1},
    ],
)
def test_one_bit_anywhere_in_a_checkpoint_is_a_difference(changed: dict[str, Any]) -> None:
    values: dict[str, Any] = {
        "weight": torch.tensor([1.0, 0.0]),
        "generator": [{"numpy": ("MT19937", np.arange(624))}],
        "common.pt": {"optimizer": [{"step": 10}]},
    }
    assert find_differences(values, dict(values)) == (3, [])
    assert find_differences(values, values | changed)[1] == list(changed)


def exchange_case(blocks_ms: float, gather_ms: float) -> dict[str, Any]:
    times = {"blocks": {"forward": blocks_ms}, "gather": {"forward": gather_ms}}
    rank = {"attention_ms": times, "exchange_ms": 1.0, "gather_ms": 2.0}
    return {"case": "b64", "density": 0.1, "share_of_gathering": 0.25, "ranks": [rank]}


def test_layouts_that_exchange_the_same_share_are_all_compared() -> None:
    text = lines("cp_bytes", {"cases": [exchange_case(1, 2), exchange_case(3, 2), exchange_case(4, 2)]})
    assert text[-1].endswith("at these shares of the bytes: 25.0%; slower at: 25.0%")


def test_a_failed_measurement_of_attention_alone_is_reported() -> None:
    text = lines("parity", {"errors": {}, "agrees": False, "cp_attention_fp32": {"error": "ran past its limit"}})
    assert text == ["attention alone, fp32: ran past its limit", "parity: FAILS"]


def test_a_finished_part_may_have_found_a_difference() -> None:
    same = {"agrees": True, "errors": {}, "fewer": {"agrees": True, "errors": {}}}
    different = same | {"fewer": {"agrees": False, "errors": {}}}
    assert [(is_done(result), disagrees(result)) for result in (same, different)] == [(True, False), (True, True)]
