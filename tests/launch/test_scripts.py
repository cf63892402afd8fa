"""Shell scripts say how to call them."""

import subprocess
from pathlib import Path

import pytest

from tests.program import ROOT


@pytest.mark.parametrize(
    "words",
    [("hybrid_vs_dense",), ("hybrid_vs_dense", "125m"), ("te_vs_local",), ("dense_layers",)],
    ids=" ".join,
)
def test_a_script_without_its_arguments_prints_its_usage(words: tuple[str, ...], tmp_path: Path) -> None:
    name, *arguments = words
    done = subprocess.run([ROOT / f"launch/{name}.sh", *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode
    assert f"launch/{name}.sh" in done.stderr.partition("usage: ")[2]
    assert list(tmp_path.iterdir()) == []
