"""The check of libraries says why a part failed."""

import runpy
import sys
from pathlib import Path

import pytest

from tests.program import ROOT


def test_a_part_that_runs_out_of_time_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = str(ROOT / "launch" / "check_libraries.py")
    monkeypatch.setattr(sys, "argv", [program, str(tmp_path), "--parts", "steps", "--seconds", "0.01"])
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    with pytest.raises(SystemExit, match=r"^failed: steps \(took longer than --seconds 0\.01; set more\)$"):
        runpy.run_path(program, run_name="__main__")
