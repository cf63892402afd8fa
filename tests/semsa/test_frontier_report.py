"""The report of frontiers: what it averages and compares, from the files that are there."""

import json
from pathlib import Path
from typing import Any

import pytest

from s2train.errors import ConfigError
from s2train.semsa.frontier_report import Measured, Model, report
from s2train.semsa.frontier_results import draw_frontier, frontier_table, read_frontier

LENGTH = 64


def frontier_row(layout: str, budget: float, change: float, draw: int = 0) -> dict[str, Any]:
    name = layout if layout == "dense" else f"{layout}-{budget:g}-{draw}"
    own = {"layout": layout, "budget": budget, "draw": draw, "density": budget - 0.01 * draw, "file": f"{name}.yaml"}
    return own | {"change": change, "loss": 2 + change}


FRONTIER = [
    frontier_row("dense", 1.0, 0.0),
    frontier_row("squared", 0.5, 0.1),
    frontier_row("random", 0.5, 0.2),
    frontier_row("random", 0.5, 0.4, draw=1),
]
LAYOUT = """\
layers: S
block_size: 16
pattern:
  kind: per_head
  rules:
  - {kind: span, base: 1, slope: 0.25, sinks: 1}
  - {kind: dense}
  heads:
  - [0, 1]
"""


def folder(path: Path, weights: str = "w") -> Path:
    """A model's folder with its frontier alone."""
    (path / "layouts").mkdir(parents=True)
    (path / "layouts" / "squared-0.5-0.yaml").write_text(LAYOUT)
    content = {"weights": weights, "model": "toy", "settings": {}, "rows": FRONTIER, "finished": True}
    (path / "frontier.json").write_text(json.dumps(content | {"seq_length": LENGTH, "samples": 1}))
    return path


def continue_runs(path: Path, losses: dict[str, float], steps: int = 5) -> None:
    rows = [
        {"layout": name, "budget": 1.0 if name == "dense" else 0.5, "held_out_loss": losses[name]} for name in losses
    ]
    (path / "continued").mkdir()
    content = {"weights": "w", "steps": steps, "rows": rows}
    (path / "continued" / "continued.json").write_text(json.dumps(content))


def time_layouts(path: Path, rows: list[dict[str, Any]], dense: list[dict[str, Any]]) -> None:
    (path / "times.json").write_text(json.dumps({"rows": rows, "dense": dense}))


densities = {row["file"]: row["density"] for row in FRONTIER}


def timed(key: str, name: str, milliseconds: float, length: int = LENGTH) -> dict[str, Any]:
    times = {"forward_ms": milliseconds / 3, "forward_backward_ms": milliseconds}
    return {key: name, "length": length, "density": densities.get(name, 1.0), **times}


def measured(path: Path) -> dict[str, Measured]:
    return {row.layout: row for row in Model.read(path).measured(0)}


def test_draws_are_averaged_and_nothing_else_is_needed(tmp_path: Path) -> None:
    found = measured(folder(tmp_path / "a"))
    assert found.keys() == {"squared", "random"}
    assert found["random"].before == pytest.approx(0.3)
    assert found["random"].density == pytest.approx(0.495)
    assert found["random"].after is None
    assert found["random"].forward_backward_ms is None


def test_after_training_a_layout_is_compared_with_dense_attention_that_trained_too(tmp_path: Path) -> None:
    path = folder(tmp_path / "a")
    continue_runs(path, {"squared": 1.75})
    assert measured(path)["squared"].after is None  # the control is not there yet
    (path / "continued" / "continued.json").unlink()
    (path / "continued").rmdir()
    continue_runs(path, {"dense": 1.5, "squared": 1.75})
    assert measured(path)["squared"].after == pytest.approx(0.25)


def test_times_are_of_the_frontiers_length_and_of_the_fastest_dense_attention(tmp_path: Path) -> None:
    path = folder(tmp_path / "a")
    rows = [timed("layout", "squared-0.5-0.yaml", ms, length) for ms, length in ((3.0, LENGTH), (99.0, 128))]
    rows += [timed("layout", f"random-0.5-{draw}.yaml", 4.0 + draw) for draw in (0, 1)]
    rows += [timed("layout", "dense.yaml", 12.0), {"layout": "window-0.5-0.yaml", "length": LENGTH, "error": "none"}]
    dense = [timed("implementation", "flash", 9.0), timed("implementation", "cudnn", 1.0, 128)]
    time_layouts(path, rows, [*dense, {"implementation": "fa4", "length": LENGTH, "absent": "not installed"}])
    found = measured(path)
    assert found["squared"].forward_backward_ms == 3.0
    assert found["squared"].forward_ms == 1.0
    assert found["random"].forward_backward_ms == 4.5
    assert Model.read(path).dense_times() == {"forward_ms": 3.0, "forward_backward_ms": 9.0}


def test_the_report_holds_every_model_and_draws_both_pictures(tmp_path: Path) -> None:
    paths = [folder(tmp_path / name) for name in ("a", "b")]
    continue_runs(paths[0], {"dense": 1.5, "squared": 1.75})
    time_layouts(paths[0], [timed("layout", "squared-0.5-0.yaml", 3.0)], [timed("implementation", "flash", 9.0)])
    table = report(tmp_path / "out.json", paths)
    content = json.loads((tmp_path / "out.json").read_text())
    assert [(row["model"], row["layout"]) for row in content["rows"]] == [
        (model, name) for model in (0, 1) for name in ("random", "squared")
    ]
    assert content["dense_loss"] == [2.0, 2.0]
    assert content["dense_loss_continued"] == [1.5, None]
    assert list(table.columns[-1].cells) == ["3.00, –", "–, –"]
    for name in ("out.png", "out-spans.png"):
        assert (tmp_path / name).stat().st_size > 1000


def with_needles(path: Path, correct: dict[str, int]) -> None:
    """Add answers to needles to a model's frontier, of 10 trials a layout."""
    content = json.loads((path / "frontier.json").read_text())
    rows = [row | {"needle_correct": correct[row["layout"]], "needle_trials": 10} for row in content["rows"]]
    (path / "frontier.json").write_text(json.dumps(content | {"rows": rows}))


def test_answers_to_needles_are_summed_over_draws_and_stand_beside_the_loss(tmp_path: Path) -> None:
    paths = [folder(tmp_path / name) for name in ("a", "b")]
    assert "needles" not in [column.header for column in report(tmp_path / "out.json", paths).columns]
    with_needles(paths[0], {"dense": 9, "squared": 8, "random": 3})
    table = report(tmp_path / "out.json", paths)
    (column,) = [column for column in table.columns if column.header == "needles"]
    assert list(column.cells) == ["8/10, –", "6/20, –"]
    assert "dense 9/10, –" in str(table.title)
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["dense_needles"] == [{"needle_correct": 9, "needle_trials": 10}, None]


def test_the_frontiers_own_table_shows_answers_where_they_were_measured(tmp_path: Path) -> None:
    path = folder(tmp_path / "a")

    def cells() -> list[str]:
        content = read_frontier(path / "frontier.json", "output") | {"dense_loss": 2.0, "needles": {"lengths": [64]}}
        draw_frontier(tmp_path / "picture.png", content, "toy")
        assert (tmp_path / "picture.png").stat().st_size > 1000
        return list(frontier_table(content).columns[1].cells)

    assert cells()[0] == "+0.1000"
    with_needles(path, {"dense": 9, "squared": 8, "random": 3})
    assert [cell for cell in cells() if cell != "–"] == ["+0.1000, 8/10", "+0.3000 (+0.200 to +0.400), 6/20"]


def test_what_does_not_belong_together_is_rejected(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "a"), folder(tmp_path / "b")
    continue_runs(one, {"dense": 1.0})
    continue_runs(two, {"dense": 1.0}, steps=6)
    with pytest.raises(ConfigError, match="they have another steps: 5, 6"):
        report(tmp_path / "out", [one, two])
    other = folder(tmp_path / "c", weights="v")
    continue_runs(other, {"dense": 1.0})
    with pytest.raises(ConfigError, match="start from another checkpoint than its frontier"):
        report(tmp_path / "out", [other])
    with pytest.raises(ConfigError, match=r"frontier\.json: there is no such file"):
        report(tmp_path / "out", [tmp_path])
    timed_elsewhere = folder(tmp_path / "d")
    file = FRONTIER[1]["file"]
    time_layouts(timed_elsewhere, [timed("layout", file, 3.0) | {"density": 0.4}], [])
    with pytest.raises(ConfigError, match=rf"times\.json: it has results of another {file}: density 0\.4000, not 0\."):
        report(tmp_path / "out", [timed_elsewhere])


@pytest.mark.parametrize("content", ["", "3", "[]", "{}"])
def test_a_file_that_is_no_frontier_is_rejected(tmp_path: Path, content: str) -> None:
    (tmp_path / "frontier.json").write_text(content)
    with pytest.raises(ConfigError, match=r"^frontier=.*frontier\.json: is no frontier \(.*layout_frontier\.py wrote"):
        read_frontier(tmp_path / "frontier.json", "frontier")
