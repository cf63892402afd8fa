"""launch/needle.py evaluates a checkpoint of launch/pretrain.py."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s2train.errors import USAGE_STATUS
from s2train.files import FolderLock
from tests.data_fixtures import write_dataset
from tests.program import Outcome, pretrain, run

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a model that writes numbers, but not the right ones."""
    folder = tmp_path_factory.mktemp("needle")
    numbers = np.random.default_rng(1).integers(1_000_000, 10_000_000, 20_000)
    write_dataset(folder / "numbers", "".join(f" {number}." for number in numbers))
    settings = ["train.steps=60", "optim.lr=1e-2", "train.precision=fp32", "tracking.log_interval=20"]
    settings += ["train.global_batch_size=4", "train.micro_batch_size=4"]
    cache = f"data.cache={folder / 'cache'}"
    pretrain(folder / "run", *settings, f"data.path={folder / 'numbers'}", cache, processes=0).succeeded()
    return folder / "run"


def needle(checkpoint: Path, output: Path, *arguments: str, processes: int = 1) -> Outcome:
    grid = ["lengths=[128,160]", "depths=[0,1]", "trials=5"]
    return run("needle.py", f"checkpoint={checkpoint}", f"output={output}", *grid, *arguments, processes=processes)


def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "needle.json").read_text())


@pytest.fixture(scope="module")
def alone(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of one process."""
    output = tmp_path_factory.mktemp("alone")
    needle(checkpoint, output, processes=0).succeeded()
    return output


def test_one_process_scores_every_cell(alone: Path) -> None:
    content = results(alone)
    asked = [(length, depth, 5) for length in (128, 160) for depth in (0.0, 1.0)]
    assert [(cell["length"], cell["depth"], cell["trials"]) for cell in content["cells"]] == asked
    # Some tokens are correct by chance, in different numbers per cell, so that the tests below can see a difference.
    assert len({cell["token_accuracy"] for cell in content["cells"]}) > 1
    assert (alone / "needle.png").is_file()


def test_results_record_the_command_line(checkpoint: Path, alone: Path) -> None:
    program, *arguments = shlex.split(results(alone)["command"])
    assert Path(program).name == "needle.py"
    assert {f"checkpoint={checkpoint}", f"output={alone}", "lengths=[128,160]"} <= set(arguments)


@pytest.mark.parametrize("arguments", [[], ["tp=2"]], ids=["dp2", "tp2"])
def test_two_processes_give_the_same_results(
    checkpoint: Path, alone: Path, tmp_path: Path, arguments: list[str]
) -> None:
    needle(checkpoint, tmp_path, *arguments, processes=2).succeeded()
    found, expected = ([cell | {"seconds": None} for cell in results(folder)["cells"]] for folder in (tmp_path, alone))
    assert found == expected


def test_a_table_that_another_evaluation_writes_is_not_written(checkpoint: Path, tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / ".needle.lock")
    rejected = needle(checkpoint, tmp_path, processes=0)
    lock.release()
    assert rejected.status == USAGE_STATUS
    assert "another evaluation writes needle.json there" in rejected.err
    assert not (tmp_path / "needle.json").exists()


def test_a_folder_that_cannot_be_locked_is_rejected(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / ".needle.lock").mkdir()
    rejected = needle(checkpoint, tmp_path, processes=0)
    assert rejected.status == USAGE_STATUS
    assert rejected.err.startswith(f"error: output={tmp_path}: can't be written")


def test_a_rerun_keeps_the_cells(checkpoint: Path, alone: Path, tmp_path: Path) -> None:
    content = results(alone)
    content["cells"][0]["correct"] = 5  # would be lost if it were evaluated again
    (tmp_path / "needle.json").write_text(json.dumps(content))
    done = needle(checkpoint, tmp_path, processes=0).succeeded()
    kept = ("length", "depth", "correct", "token_accuracy", "character_accuracy", "reach")
    found, expected = ([[cell[name] for name in kept] for cell in r["cells"]] for r in (results(tmp_path), content))
    assert found == expected
    assert done.out.count("from earlier results") == 4


@pytest.mark.parametrize(
    ("argument", "processes"), [("haystack=[missing.txt]", 0), ("attention_backend=foo", 0), ("tp=3", 2)]
)
def test_bad_input_is_rejected_with_one_line_and_a_status(
    checkpoint: Path, tmp_path: Path, argument: str, processes: int
) -> None:
    done = needle(checkpoint, tmp_path / "out", argument, processes=processes)
    assert done.status != 0
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ") or not processes]
    assert line.startswith(f"error: {argument.split('=')[0]}=")
    assert not (tmp_path / "out").exists()
