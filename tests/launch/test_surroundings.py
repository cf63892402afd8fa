"""A program that can't start prints why in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.program import ROOT

PROGRAMS = sorted(path.name for path in ROOT.glob("launch/*.py") if not path.name.startswith("_"))


def started(program: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A program under a Python without packages."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK")}
    command = [sys.executable, "-S", str(ROOT / "launch" / program)]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_python_without_the_packages_prints_how_to_install_them(program: str) -> None:
    done = started(program)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {sys.executable}: package ")
    assert f"-m pip install -c constraints.txt -e . in {ROOT}" in line or f"Run it with {ROOT}/.venv" in line


@pytest.mark.parametrize("program", ["pretrain.py", "job.py"])
@pytest.mark.parametrize("threads", ["abc", "0", "", "2,x"])
def test_a_thread_count_that_is_no_number_is_rejected(program: str, threads: str) -> None:
    done = started(program, OMP_NUM_THREADS=threads)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: OMP_NUM_THREADS={threads}: ")
    assert "unset it" in line


@pytest.mark.parametrize("threads", ["1", "16", "4,2"])
def test_thread_counts_that_openmp_reads_are_accepted(threads: str) -> None:
    assert "OMP_NUM_THREADS" not in started("pretrain.py", OMP_NUM_THREADS=threads).stderr


def test_a_notebooks_backend_for_pictures_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import _surroundings\nimport matplotlib")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "launch"), "MPLBACKEND": "not-installed"}
    command = [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_module_that_an_installed_package_lacks_is_printed_with_its_stack(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import _surroundings\nimport json.nothing")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "launch")}
    command = [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert "Traceback" in done.stderr
    assert "is not installed" not in done.stderr
