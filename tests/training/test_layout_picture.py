"""The picture of a run's layout is drawn while the run trains."""

import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from s2train import pictures
from s2train.config import PretrainConfig
from s2train.errors import ConfigError
from s2train.planning import compose_run, hybrid_layout
from s2train.training import layout_picture
from s2train.training.layout_picture import LayoutPicture, check_matplotlib
from tests.processes import wait_for


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


@pytest.fixture
def unassisted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process draws."""
    monkeypatch.setattr(layout_picture, "start_process", lambda cfg, errors: None)


def started(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Have the process run another program, which waits for no imports."""
    monkeypatch.setattr(layout_picture, "worker_command", lambda module: [sys.executable, "-c", program])


def test_a_process_draws_it_during_the_steps(cfg: PretrainConfig) -> None:
    picture = picture_of(cfg, tracker := FakeTracker())
    with picture:
        picture.start()
        wait_for(lambda: bool(tracker.pictures or tracker.notes), "the picture")
        assert (tracker.pictures, tracker.notes) == ([("layout/picture", True)], [])
    assert picture.path == Path(cfg.run_dir) / "layout.png"
    assert len(tracker.pictures) == 1


def test_what_no_process_has_drawn_is_drawn_at_the_end(cfg: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    started(monkeypatch, "import time; time.sleep(60)")
    picture = picture_of(cfg, tracker := FakeTracker())
    with picture:
        picture.start()
    assert picture.path == Path(cfg.run_dir) / "layout.png"
    assert tracker.pictures == [("layout/picture", True)]


def test_an_error_of_its_process_is_logged(cfg: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    started(monkeypatch, "raise OSError('disk is full')")
    picture = picture_of(cfg, tracker := FakeTracker())
    with picture:
        picture.start()
        wait_for(lambda: bool(tracker.notes), "the note")
    assert tracker.notes == ["the layout's picture can't be drawn: OSError: disk is full; continuing"]
    assert (tracker.pictures, picture.path) == ([], None)


def test_what_a_signal_to_all_processes_interrupts_is_drawn_at_the_end(
    cfg: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGUSR1)")
    picture = picture_of(cfg, tracker := FakeTracker())
    with picture:
        picture.start()
        wait_for(lambda: not any(thread.name == "layout picture" for thread in threading.enumerate()), "the thread")
    assert (tracker.pictures, tracker.notes) == ([("layout/picture", True)], [])


def test_without_a_place_for_temporary_files_it_is_drawn_at_the_end(
    cfg: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(Path(cfg.run_dir) / "missing"))
    picture = picture_of(cfg, tracker := FakeTracker())
    with picture:
        picture.start()
    assert tracker.pictures == [("layout/picture", True)]
    assert tracker.notes[0].startswith("the layout's picture is drawn at the end: ")


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


@pytest.mark.usefixtures("unassisted")
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


@pytest.mark.usefixtures("unassisted")
def test_a_run_that_an_error_ends_draws_nothing(cfg: PretrainConfig) -> None:
    picture = picture_of(cfg, tracker := FakeTracker())
    picture.start()
    with pytest.raises(RuntimeError, match="a step"), picture:
        raise RuntimeError("a step")
    assert (tracker.pictures, picture.path) == ([], None)


def fail(*arguments: Any, **named: Any) -> None:
    raise OSError("disk is full")
