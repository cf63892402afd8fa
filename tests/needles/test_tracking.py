"""Needle results are logged to the training's wandb run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from s2train.checkpoints.folders import Progress
from s2train.config import ModelConfig, PretrainConfig, TrainConfig
from s2train.needles.results import Cell, CellReach, NeedleResults
from s2train.needles.tracking import COLUMNS, log_needles
from tests.test_wandb_run import FakeWandb, fake


def results(checkpoint: Path) -> NeedleResults:
    cells = [Cell(128, 0.0, 1, 4, 0.5, 0.6, CellReach(2, 1, 3, 8)), Cell(128, 1.0, 4, 4, 1.0, 1.0)]
    return NeedleResults(str(checkpoint), 7, {}, [128], [0.0, 1.0], cells, threshold=0.6)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    made = fake(monkeypatch)
    made.Table = lambda columns, data: SimpleNamespace(columns=columns, data=data)
    return made


@pytest.mark.parametrize("known", ["run5", None])
def test_cells_scores_and_heat_map_are_logged_to_the_run_in_the_checkpoint(
    wandb: FakeWandb, known: str | None, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "iter_0000007"
    checkpoint.mkdir(parents=True)
    Progress(7, 56, {}, known).write(checkpoint / "progress.json")
    trained = PretrainConfig(
        model=ModelConfig(name="m"), train=TrainConfig(seq_length=128), run_dir=str(tmp_path / "run")
    )
    logged = log_needles({"single": results(checkpoint)}, trained, tmp_path / "needle", "offline")
    assert wandb.finished
    (settings,) = wandb.inits
    assert settings["id"] == logged
    assert known is None or logged == known
    logged: dict[str, Any] = {}
    for row in wandb.rows:
        assert (row["step"], row["data/consumed_tokens"]) == (7, 56 * 128)
        logged |= row
    table = logged["needle/cells"]
    assert table.columns == list(COLUMNS)
    assert [dict(zip(COLUMNS, row, strict=True))["score"] for row in table.data] == [0.25, 1.0]
    assert [row[-4:] for row in table.data] == [[2, 1, 3, 8], [None] * 4]
    assert logged["needle/single/heat_map"] == str(tmp_path / "needle" / "needle.png")
    assert (logged["needle/single/score"], logged["needle/single/effective_length"]) == (0.625, 128)
