"""What an installation brings."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_installed() -> None:
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"s2train." + ".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("kernels/**/__init__.py")}
    ours = (path.parent.relative_to(ROOT).parts for path in ROOT.glob("s2train/**/__init__.py"))
    found |= {".".join(parts) for parts in ours if parts[1:2] != ("kernels",)}
    assert declared == found
