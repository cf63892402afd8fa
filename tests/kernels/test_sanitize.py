"""What is made of compute-sanitizer's output, and of programs that fail, hang or say nothing."""

import json
import sys
from pathlib import Path

import pytest
import torch
from s2train.kernels.check import sanitize, sanitize_cases
from s2train.kernels.check.sanitize_report import parse

# in the formats of NVIDIA's manual
MEMCHECK = """========= COMPUTE-SANITIZER
Mallocing memory
========= Invalid __global__ write of size 4 bytes
=========     at unaligned_kernel()+0x50
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x710fdca00001 is misaligned
=========
Running
========= Invalid __global__ write of size 4 bytes
=========     at out_of_bounds_kernel()+0x90
=========
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at sumKernel(int *, int *)+0x90 in block_error.cu:41
=========     and Read access at sumKernel(int *, int *)+0x100 in block_error.cu:51 [508 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
CLEAN = "========= COMPUTE-SANITIZER\nhello\n========= ERROR SUMMARY: 0 errors\n"
NO_RACES = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
WARNINGS = "========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)\n"
LOST = (
    "========= Internal Sanitizer Error: The Sanitizer encountered an error while launching kernel_name and didn't "
    "track the launch. Errors might go undetected.\n========= ERROR SUMMARY: 0 errors\n"
)


@pytest.mark.parametrize(
    ("output", "errors", "warnings"),
    [
        (CLEAN, 0, 0),
        (NO_RACES, 0, 0),
        (MEMCHECK, 2, 0),
        (RACECHECK, 1, 0),
        (WARNINGS, 0, 2),
        (CLEAN + MEMCHECK, 2, 0),  # two processes
        ("========= COMPUTE-SANITIZER\n", None, 0),
        ("", None, 0),
    ],
)
def test_summaries_are_counted(output: str, errors: int | None, warnings: int) -> None:
    found = parse(output)
    assert (found.errors, found.warnings) == (errors, warnings)


def test_reports_are_sorted_by_kind_and_the_first_is_kept() -> None:
    found = parse(MEMCHECK)
    what = "Invalid __global__ write of size 4 bytes at"
    assert found.kinds == {f"{what} unaligned_kernel()+…": 1, f"{what} out_of_bounds_kernel()+…": 1}
    assert found.in_ours == 0
    assert found.first_report[1].strip() == "at unaligned_kernel()+0x50"
    assert found.first_report[-1].strip() == "Address 0x710fdca00001 is misaligned"
    assert found.last_lines[-1] == "========= ERROR SUMMARY: 2 errors"
    assert list(parse(RACECHECK).kinds) == [
        "Error: Race reported between Write access at sumKernel(int *, int *)+… in block_error.cu:41 "
        "and Read access at sumKernel(int *, int *)+… in block_error.cu:51 …"
    ]


def test_a_report_on_our_kernels_comes_first() -> None:
    found = parse(MEMCHECK.replace("out_of_bounds_kernel()", "s2_attention_fwd_kernel_hopper"))
    assert found.in_ours == 1
    assert found.first_report[1].strip() == "at s2_attention_fwd_kernel_hopper+0x90"


def verdict(output: str, tool: str = "memcheck", status: int = 0, sleep: float = 0, seconds: float = 60) -> str:
    program = f"import sys, time; print({output!r}, flush=True); time.sleep({sleep}); sys.exit({status})"
    return str(sanitize.run_one(tool, "some case", [sys.executable, "-c", program], seconds)["verdict"])


DONE = sanitize_cases.DONE + " forward hopper, backward triton\n"


@pytest.mark.parametrize(
    ("output", "tool", "status", "expected"),
    [
        (DONE + CLEAN, "memcheck", 0, "clean"),
        (DONE, "none", 0, "clean"),
        (DONE, "memcheck", 0, "no summary"),
        (CLEAN, "memcheck", 0, "the program failed"),  # zero errors of a program that did nothing
        (DONE + MEMCHECK, "memcheck", 99, "found something"),
        (DONE + WARNINGS, "racecheck", 0, "found something"),
        (DONE + LOST, "memcheck", 0, "found something"),
        (DONE + CLEAN, "memcheck", 3, "exit status 3"),
    ],
)
def test_only_a_finished_program_with_an_empty_summary_is_clean(
    output: str, tool: str, status: int, expected: str
) -> None:
    assert verdict(output, tool, status) == expected


def test_a_program_that_hangs_is_stopped_and_what_it_said_is_kept() -> None:
    assert verdict(DONE + CLEAN, sleep=60, seconds=2) == "stopped after 2 s"


def test_nothing_begins_without_time() -> None:
    assert verdict(CLEAN, seconds=0) == "not run: out of time"


@pytest.mark.parametrize(
    ("usage", "option"),
    [("  --kernel-name arg", "--kernel-name"), ("  --kernel-regex arg", "--kernel-regex"), ("--filter", "--filter")],
)
def test_kernels_are_filtered_by_name_except_for_initcheck(usage: str, option: str) -> None:
    found = sanitize.kernel_option(usage)
    assert found == option
    assert sanitize.command("cs", "racecheck", found)[-2:] == [option, "kernel_substring=s2_attention"]
    assert option not in sanitize.command("cs", "initcheck", found)


def fake_sanitizer(folder: Path) -> None:
    """A compute-sanitizer that runs nothing and finds a race in every case."""
    said = DONE + RACECHECK
    script = f"#!{sys.executable}\nimport sys\nprint('Version 1' if '--version' in sys.argv else {said!r})\n"
    (folder / "compute-sanitizer").write_text(script)
    (folder / "compute-sanitizer").chmod(0o755)


def test_the_program_writes_what_every_tool_said_of_every_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_sanitizer(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    name, out = next(iter(sanitize_cases.CASES)), tmp_path / "found.json"
    assert sanitize.main(["--tool", "racecheck", "synccheck", "--cases", name, "--out", str(out)]) == 1
    data = json.loads(out.read_text())
    rows = {row["tool"]: row for row in data["runs"]}
    assert list(rows) == ["none", "racecheck", "synccheck"]
    assert rows["none"]["verdict"] == "the program failed"  # there is no CUDA device
    assert rows["racecheck"]["errors"] == 1
    assert rows["racecheck"]["kernels"] == "forward hopper, backward triton"
    assert data["sanitizer"] == ["Version 1"]
    assert "1 × Error: Race reported" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        sanitize.main(["--out", str(out)])


def test_without_compute_sanitizer_there_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitize.main(["--out", str(tmp_path / "x.json")]) == 2
    assert "not on PATH" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


AMONG_THEM = ("d 64, block 64", "deterministic, block 128", "packed, block 32")


@pytest.mark.parametrize(
    "name",
    [*AMONG_THEM, *(pytest.param(x, marks=pytest.mark.long) for x in sanitize_cases.CASES if x not in AMONG_THEM)],
)
def test_cases_run(name: str) -> None:
    """On a CPU by torch's kernels; which would run on a GPU is not known there."""
    case = sanitize_cases.CASES[name]
    kernels = sanitize_cases.run(case, torch.device("cpu"))
    torch.use_deterministic_algorithms(False)
    assert set(kernels) == {"forward", "backward", "choices"}
