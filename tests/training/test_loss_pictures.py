"""Loss curves are read from metrics.jsonl and drawn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from s2train.errors import ConfigError
from s2train.planning import compose_run
from s2train.training.plots import draw_comparison, draw_loss_curve
from s2train.training.records import read_curves
from s2train.training.run_report import report_end


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    records = [{"step": step, "loss": 5 / step, "lr": 0.1} for step in range(1, 30)]
    records += [{"step": 20, "held_out_loss": 0.5}]
    return write(tmp_path / "metrics.jsonl", [{"event": "start", "step": 0, "tokens_per_step": 64}, *records])


def is_picture(path: Path) -> bool:
    picture = Image.open(path).convert("RGB")
    return len(np.unique(np.asarray(picture))) > 10


@pytest.mark.usefixtures("metrics")
def test_a_curve_that_cannot_be_drawn_does_not_fail_a_finished_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = compose_run(["+model=tiny_hybrid", f"run_dir={tmp_path}"])
    (tmp_path / "loss.png").mkdir()  # nothing can be written there
    assert report_end(cfg, None, None) is None
    assert "the loss curve can't be drawn: IsADirectoryError" in capsys.readouterr().out
    (tmp_path / "loss.png").rmdir()
    assert report_end(cfg, None, None) == tmp_path / "loss.png"


def test_losses_are_read_by_step(metrics: Path) -> None:
    curves = read_curves(metrics)
    assert curves.train[10] == 0.5
    assert curves.held_out == {20: 0.5}
    assert curves.tokens_per_step == 64


def test_steps_repeated_after_a_resume_replace_the_first_ones(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"step": 1, "loss": 5.0},
        {"step": 2, "loss": 4.0},
        {"step": 3, "loss": 9.0},
    ]
    records += [{"event": "resume", "step": 1}, {"step": 2, "loss": 3.5}]
    curves = read_curves(write(tmp_path / "m.jsonl", records))
    assert curves.train == {1: 5.0, 2: 3.5}
    assert curves.resumed == [1]


def test_steps_from_which_held_out_text_differs_are_read_unless_a_resume_repeats_them(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    for step in (10, 20):
        records += [{"event": "resume", "step": step}, {"event": "other held-out data", "step": step}]
    path = tmp_path / "m.jsonl"
    assert read_curves(write(path, records)).other_held_out == [10, 20]
    assert read_curves(write(path, [*records, {"event": "resume", "step": 15}])).other_held_out == [10]


def test_tokens_are_counted_by_the_batch_of_each_step(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [{"event": "config", "tokens_per_step": 64}, {"step": 12, "loss": 5.0}]
    for step, size in ((10, 32), (14, 128)):
        records += [{"event": "config", "tokens_per_step": size}, {"event": "resume", "step": step}]
    curves = read_curves(write(tmp_path / "m.jsonl", records))
    assert [curves.tokens(step) for step in (5, 10, 12, 15)] == [320, 640, 704, 640 + 128 + 128]
    assert curves.tokens_per_step is None


def test_a_truncated_line_is_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", [{"step": 1, "loss": 5.0}])
    path.write_text(path.read_text() + '{"step": 2, "lo')
    assert read_curves(path).train == {1: 5.0}


def test_a_loss_curve_is_drawn_with_and_without_its_optional_parts(metrics: Path, tmp_path: Path) -> None:
    draw_loss_curve(metrics, tmp_path / "a.png", baseline=3.1, title="run")
    only_train = write(tmp_path / "m.jsonl", [{"step": 1, "loss": 5.0}, {"event": "resume", "step": 1}])
    draw_loss_curve(only_train, tmp_path / "b.png")
    diverged = write(tmp_path / "n.jsonl", [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": None}])
    draw_loss_curve(diverged, tmp_path / "c.png")
    with only_train.open("a") as file:
        file.write(json.dumps({"event": "other held-out data", "step": 1}))
    draw_loss_curve(only_train, tmp_path / "d.png")
    assert all(is_picture(tmp_path / f"{name}.png") for name in "abcd")
    assert (tmp_path / "d.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_a_comparison_is_drawn(metrics: Path, tmp_path: Path) -> None:
    draw_comparison({"dense": metrics, "hybrid": metrics}, tmp_path / "a.png")
    assert is_picture(tmp_path / "a.png")


def test_ticks_of_close_losses_and_many_steps_are_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        save(figure, *args, **kwargs)
        drawn.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    records = [{"step": step * 10**7, "loss": 5.025 + step * 1e-6} for step in range(1, 9)]
    draw_loss_curve(write(tmp_path / "m.jsonl", records), tmp_path / "a.png")
    (axes,) = drawn[0].axes
    assert {axis.get_offset_text().get_text() for axis in (axes.xaxis, axes.yaxis)} == {""}
    assert all(label.get_text().startswith("5.025") for label in axes.get_yticklabels())


def test_a_missing_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        draw_loss_curve(tmp_path / "none.jsonl", tmp_path / "a.png")
