"""The check that is carried to a GPU, on the interpreter."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from s2train.kernels.check import __main__ as program
from s2train.kernels.check import run as check_run
from s2train.kernels.check.cases import CASES, TIMINGS, case_names
from s2train.kernels.check.run import check_case

SMALL = {"s_q": 40, "dim": 16, "heads": 2, "kv_heads": 1, "block": 16}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "name",
    [
        "bfloat16 block 64 d 128", "sbhd batch 3 block 128", "gradient of out alone, block 64",
        "gradient of lse alone, block 64", "deterministic", "split, block 64",
    ],
)  # fmt: skip
def test_right_kernels_pass(name: str, device: torch.device) -> None:
    result = check_case(replace(CASES[name], **SMALL), device)
    assert result["ok"]
    assert (result["forward"], result["backward"], result["choices"]) == ("triton", "triton", "")


@pytest.mark.usefixtures("poisoned")
def test_views_of_a_fused_projection_pass(device: torch.device) -> None:
    assert check_case(replace(CASES["fused q, k, v, block 64"], **SMALL | {"kv_heads": 2}), device)["ok"]


@pytest.mark.usefixtures("poisoned")
def test_an_oracle_by_parts_agrees_with_the_whole_one(device: torch.device) -> None:
    case = replace(CASES["offset 777 block 128"], **SMALL | {"query_offset": 7, "dtype": "float32", "batch": 2})
    found = []
    for rows in (0, 16):
        torch.manual_seed(0)
        found.append(check_case(replace(case, oracle_rows=rows), device))
        assert found[-1]["ok"]
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert found[0][name][0] == pytest.approx(found[1][name][0], rel=1e-3)


def test_wrong_results_fail(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    right = check_run.block_sparse_attention

    def wrong(*args: object, **options: object) -> object:
        out, lse = right(*args, **options)  # type: ignore[call-overload]
        return out * 1.01, lse

    monkeypatch.setattr(check_run, "block_sparse_attention", wrong)
    # without any block 0 would be right
    result = check_case(replace(CASES["float32 block 64 d 128"], **SMALL, keep=1.0), device)
    assert not result["ok"]


def test_names_are_unique() -> None:
    assert set(case_names(quick=True)) < set(case_names(quick=False))
    assert len({timing.name for timing in TIMINGS}) == len(TIMINGS)


def test_cases_are_chosen_by_parts_of_their_names() -> None:
    assert case_names(False, ["deterministic"]) == ("top-k, deterministic", "deterministic")
    assert case_names(True, ["deterministic"]) == ("deterministic",)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ["top-k shared, block 64, batch 3", "masks of each sequence, block 128, portable"])
def test_run_time_layouts_pass(name: str, device: torch.device) -> None:
    case = replace(CASES[name], **SMALL, batch=2)
    result = check_case(replace(case, steps=min(case.steps, 2)), device)
    assert result["ok"]
    assert result.get("steps", 0) == min(case.steps, 2)


def test_steps_that_leave_something_behind_fail(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    left = {"steps": 1, "compiled": [], "registered": 1, "grown bytes": 0}
    monkeypatch.setattr(check_run, "fresh_steps", lambda *arguments: left)
    assert not check_case(replace(CASES["top-k, block 128"], **SMALL), device)["ok"]


def test_cases_without_memory_beside_others_are_checked_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def run_tasks(command: list[str], tasks: list[Any], jobs: int, seconds: float) -> list[dict[str, Any]]:
        asked.append((len(tasks), jobs))
        full = {"ok": False, "error": "OutOfMemoryError: CUDA out of memory"}
        return [full if jobs > 1 and at == 1 else {"ok": True, "error": "none"} for at in range(len(tasks))]

    monkeypatch.setattr(program, "run_tasks", run_tasks)
    rows: list[dict[str, Any]] = []
    saved: list[int] = []
    program.check_cases(list(CASES.values())[:3], 2, rows, lambda: saved.append(len(rows)))
    assert asked == [(3, 2), (1, 1)]
    assert [row["ok"] for row in rows] == [True, True, True]
    assert rows[1]["first_error"].startswith("OutOfMemoryError")
    assert saved == [1, 2, 3, 3]


@pytest.mark.parametrize("name", ["check.__main__", "hopper.tune"])
def test_results_are_not_overwritten(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = pytest.importorskip(f"s2train.kernels.{name}")
    (tmp_path / "found.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", [name, "--json", str(tmp_path / "found.json")])
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert "results are not overwritten, name another --json" in capsys.readouterr().err
