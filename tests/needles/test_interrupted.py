"""An interrupted evaluation keeps its finished cells, and the same command resumes."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.program import ROOT, Outcome, pretrain, run

pytestmark = [pytest.mark.slow]

GRID = ["lengths=[112,128]", "depths=[0,1]", "trials=3"]


def cells(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "needle.json").read_text())["cells"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of an untrained model."""
    folder = tmp_path_factory.mktemp("run")
    pretrain(folder, "train.steps=3", "data.path=mock", f"data.cache={folder / 'cache'}", processes=0).succeeded()
    return folder


@pytest.fixture(scope="module")
def interrupted(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """Output folder and outcome of a process that got Ctrl-C while it decoded its second cell."""
    output, program = tmp_path_factory.mktemp("interrupted"), ROOT / "tests" / "needles" / "interrupted.py"
    done = run(str(program), f"checkpoint={checkpoint}", f"output={output}", *GRID, processes=0)
    return output, done


def test_an_interruption_prints_one_line_and_exits_with_its_status(interrupted: tuple[Path, Outcome]) -> None:
    _, done = interrupted
    assert done.status == 130
    assert done.err.splitlines() == ["interrupted; saved files are kept"]


def test_the_cells_finished_before_an_interruption_are_kept(interrupted: tuple[Path, Outcome]) -> None:
    output, _ = interrupted
    assert [(cell["length"], cell["depth"]) for cell in cells(output)] == [(112, 0.0)]


def test_the_same_command_resumes_from_the_finished_cells(
    checkpoint: Path, interrupted: tuple[Path, Outcome], tmp_path: Path
) -> None:
    content = json.loads((interrupted[0] / "needle.json").read_text())
    content["cells"][0]["token_accuracy"] = 2.0  # would be lost if it were evaluated again
    (tmp_path / "needle.json").write_text(json.dumps(content))
    done = run("needle.py", f"checkpoint={checkpoint}", f"output={tmp_path}", *GRID, processes=0).succeeded()
    first, *others = cells(tmp_path)
    assert first["token_accuracy"] == 2.0
    assert [(cell["length"], cell["depth"], cell["trials"]) for cell in others] == [
        (112, 1.0, 3),
        (128, 0.0, 3),
        (128, 1.0, 3),
    ]
    assert done.out.count("from earlier results") == 1
