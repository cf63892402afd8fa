"""What an installation brings."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from s2train.kernels.hopper.support import TRITON

ROOT = Path(__file__).parents[1]
# What PyPI's wheels of torch require; the CPU builds that tests run on require none, and would not show a conflict.
TRITON_OF_TORCH = {"2.11.0": "3.6.0", "2.13.0": "3.7.1"}


def test_every_package_is_installed() -> None:
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"s2train." + ".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("kernels/**/__init__.py")}
    ours = (path.parent.relative_to(ROOT).parts for path in ROOT.glob("s2train/**/__init__.py"))
    found |= {".".join(parts) for parts in ours if parts[1:2] != ("kernels",)}
    assert declared == found


def constraints(python: str) -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {r.name: r for r in found if r.marker is None or r.marker.evaluate({"python_version": python})}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_tested_versions_can_be_installed_together(python: str) -> None:
    held = constraints(python)
    (torch,) = held["torch"].specifier
    assert held["triton"].specifier.contains(TRITON_OF_TORCH[torch.version])


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_hopper_kernels_run_in_the_triton_that_is_installed(python: str) -> None:
    (torch,) = constraints(python)["torch"].specifier
    assert TRITON_OF_TORCH[torch.version].startswith(TRITON)
