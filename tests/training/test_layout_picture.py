"""The picture of a run's layout is drawn beside its steps."""

import sys
from pathlib import Path
from typing import Any

import pytest

from s2train import pictures
from s2train.config import PretrainConfig
from s2train.errors import ConfigError
from s2train.planning import compose_run, hybrid_layout
from s2train.training.layout_picture import LayoutPicture, check_matplotlib


class FakeTracker:
    """Keeps the notes and pictures that it gets, and whether these could be read."""

    def __init__(self) -> None:
        self.pictures: list[tuple[str, bool]] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def picture(self, name: str, path: Path) -> None:
        self.pictures.append((name, path.stat().st_size > 1000))


@pytest.fixture
def cfg(tmp_path: Path) -> PretrainConfig:
    return compose_run(["+model=tiny_hybrid", f"run_dir={tmp_path}"])


def picture_of(cfg: PretrainConfig, tracker: Any, *, active: bool = True) -> LayoutPicture:
    return LayoutPicture(cfg, hybrid_layout(cfg), tracker, active=active)


def test_it_is_drawn_at_the_end_of_the_context_and_shown(cfg: PretrainConfig) -> None:
    picture = picture_of(cfg, tracker := FakeTracker())
    with picture:
        picture.start()
    assert picture.path == Path(cfg.run_dir) / "layout.png"
    assert tracker.pictures == [("layout/picture", True)]


def test_other_ranks_draw_nothing(cfg: PretrainConfig) -> None:
    picture = picture_of(cfg, tracker := FakeTracker(), active=False)
    with picture:
        picture.start()
    assert tracker.pictures == []
    assert not list(Path(cfg.run_dir).iterdir())


def test_a_layout_that_data_choose_has_no_picture(tmp_path: Path) -> None:
    cfg = compose_run(["+model=tiny_moba", f"run_dir={tmp_path}"])
    picture = picture_of(cfg, tracker := FakeTracker())
    with picture:
        picture.start()
    assert picture.path is None
    assert tracker.pictures == []


def test_one_that_cannot_be_drawn_is_logged_and_stops_no_run(
    cfg: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "draw_layout", fail)
    picture = picture_of(cfg, tracker := FakeTracker())
    with picture:
        picture.start()
    assert tracker.notes == ["the layout's picture can't be drawn: OSError: disk is full; continuing"]
    assert tracker.pictures == []
    assert picture.path is None


def test_a_run_without_matplotlib_is_rejected_before_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="need it"):
        check_matplotlib()


def test_an_error_of_the_steps_comes_first(cfg: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "draw_layout", fail)
    picture = picture_of(cfg, FakeTracker())
    picture.start()
    with pytest.raises(RuntimeError, match="a step"), picture:
        raise RuntimeError("a step")


def fail(*arguments: Any, **named: Any) -> None:
    raise OSError("disk is full")
