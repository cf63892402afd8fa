import json
from pathlib import Path

import pytest

from s2train.comparison.loss_gap import Gap, gaps
from s2train.errors import ConfigError


def run(folder: Path, losses: dict[int, float | None]) -> Path:
    """A run folder with a report of each step."""
    folder.mkdir()
    reports = [{"step": step, "loss": loss} for step, loss in losses.items()]
    lines = [json.dumps(record) + "\n" for record in ({"event": "config"}, *reports)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_losses_are_compared_step_by_step(tmp_path: Path) -> None:
    base = run(tmp_path / "base", {1: 4.0, 2: 3.0, 3: 2.5, 4: 2.0})
    other = run(tmp_path / "other", {1: 4.5, 2: 2.0, 3: None, 4: 2.25})
    assert gaps(base, [other]) == [Gap("other", 3, 0.5, pytest.approx(1.75 / 3), 1.0, 0.25)]


def test_a_mean_over_steps_is_not_compared_with_the_last_of_them(tmp_path: Path) -> None:
    base = run(tmp_path / "base", {1: 4.0, 2: 3.0, 3: 2.5, 4: 2.0})
    with pytest.raises(ConfigError, match=r"^runs=.*other: has no report over the same steps"):
        gaps(base, [run(tmp_path / "other", {2: 3.5, 4: 2.25})])
