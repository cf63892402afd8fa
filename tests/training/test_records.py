"""Records of a run are read the same everywhere."""

from pathlib import Path
from typing import Any

import pytest

from s2train.errors import ConfigError
from s2train.training.records import last_evaluation, read_records


def test_the_last_evaluation_is_the_last_even_if_its_loss_is_not_finite() -> None:
    records: list[dict[str, Any]] = [{"event": "config"}, {"step": 1, "loss": 3.0}]
    assert last_evaluation(records) is None
    records += [{"step": step, "held_out_loss": loss} for step, loss in ((2, 2.5), (4, None))]
    assert last_evaluation([*records, {"step": 5, "loss": None}]) == {"step": 4, "held_out_loss": None}


@pytest.mark.parametrize(
    "line", ['{"step": "1", "loss": 2}', '{"step": 1, "loss": "2"}', '{"loss": 2.0}', '{"event": "resume"}']
)
def test_a_record_whose_step_or_loss_is_no_number_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(f'{{"event": "config"}}\n{{"step": 1, "loss": null}}\n{line}\n')
    with pytest.raises(
        ConfigError, match=rf"^metrics={metrics}: line 3 has a step or a loss that is no number\. Remove"
    ):
        read_records(metrics)


def test_lines_that_are_cut_short_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "config"}\n{"step": 1, "lo\nnull\n{"step": 2, "loss": 2}')
    assert read_records(tmp_path / "metrics.jsonl") == [{"event": "config"}, {"step": 2, "loss": 2}]
