"""Logging to wandb in the background never stops or delays training."""

import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from s2train import wandb_run
from s2train.config import TrackingConfig
from s2train.errors import EXIT_REQUEUE, ConfigError
from s2train.wandb_run import RunInfo, WandbRun, choose_mode, place_of
from tests.program import ROOT, SMALL, run


class FakeWandb(SimpleNamespace):
    """Stands for the module: writes down what is asked of it; `failing` modes raise on init, `slow` waits in it.

    Attributes:
        connected: what a slow init waits for, a minute at most.
        defined: the metrics that have an x-axis, or are one.
    """

    def __init__(self, *, failing: tuple[str, ...] = (), slow: bool = False, key: bool = False) -> None:
        super().__init__(Settings=SimpleNamespace, Image=str, login=lambda **_: key)
        self.failing, self.inits, self.rows, self.finished = failing, [], [], False
        self.defined: dict[str, str | None] = {}
        self.connected = threading.Event()
        if not slow:
            self.connected.set()

    def init(self, **settings: Any) -> Any:
        self.connected.wait(60)
        self.inits.append(settings)
        if settings["mode"] in self.failing:
            raise ConnectionError("no route to host")

        def finish() -> None:
            self.finished = True

        def define_metric(name: str, step_metric: str | None = None) -> None:
            self.defined[name] = step_metric

        return SimpleNamespace(id=settings["id"], log=self.rows.append, define_metric=define_metric, finish=finish)


def fake(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> FakeWandb:
    made = FakeWandb(**settings)
    monkeypatch.setitem(sys.modules, "wandb", made)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return made


def info(folder: Path, mode: str = "online", identifier: str | None = None, **tracking: Any) -> RunInfo:
    return RunInfo(mode, identifier, folder, {"seed": 1}, TrackingConfig(group="group", **tracking))


@pytest.mark.parametrize(
    ("wanted", "key", "environment", "mode"),
    [
        ("auto", False, None, "offline"),
        ("auto", True, None, "online"),
        ("auto", True, "disabled", "disabled"),
        ("offline", True, "online", "offline"),
        ("disabled", True, "online", "disabled"),
        ("online", True, "offline", "online"),
    ],
)
def test_auto_is_online_with_an_account_and_explicit_modes_are_kept(
    wanted: str, key: bool, environment: str | None, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, key=key)
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    assert choose_mode(wanted) == mode


def test_without_wandb_auto_is_disabled_and_other_modes_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert choose_mode("auto") == "disabled"
    with pytest.raises(ConfigError, match=r"tracking.wandb=offline: wandb can't be imported"):
        choose_mode("offline")


def test_online_without_an_account_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)
    with pytest.raises(ConfigError, match=r"wandb=online: no API key .*wandb login"):
        choose_mode("online", "wandb")


def test_a_resumed_run_keeps_its_id_and_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb = fake(monkeypatch)
    run = WandbRun(info(tmp_path, identifier="abcd1234"))
    run.log({"step": 1})
    run.close()
    (settings,) = wandb.inits
    assert (run.id, settings["id"], settings["resume"], settings["group"]) == ("abcd1234", "abcd1234", "allow", "group")
    assert wandb.rows == [{"step": 1}]
    assert wandb.finished


def test_a_run_is_named_as_set_or_after_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb = fake(monkeypatch)
    named = {"entity": "team", "name": "mine", "tags": ["a", "b"], "notes": "why"}
    WandbRun(info(tmp_path, **named)).close()
    WandbRun(info(tmp_path)).close()
    first, second = wandb.inits
    assert {setting: first[setting] for setting in named} == named
    assert (second["entity"], second["name"], second["tags"], second["notes"]) == (None, tmp_path.name, None, None)


@pytest.mark.parametrize(("axis", "key"), [("step", "step"), ("consumed_tokens", "data/consumed_tokens")])
def test_charts_are_over_steps_or_consumed_tokens(
    axis: str, key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wandb = fake(monkeypatch)
    WandbRun(info(tmp_path, x_axis=axis)).close()
    assert wandb.defined == {"step": None, "data/consumed_tokens": None, "*": key}


def test_without_a_network_a_run_is_kept_offline_under_the_same_id(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wandb, said = fake(monkeypatch, failing=("online",)), []
    run = WandbRun(info(tmp_path), said.append)
    run.log({"step": 1})
    run.close()
    assert [(i["mode"], i["id"]) for i in wandb.inits] == [("online", run.id), ("offline", run.id)]
    assert wandb.rows == [{"step": 1}]
    (line,) = said
    assert "no route to host" in line
    assert "wandb sync" in line


def test_a_run_that_cannot_be_made_at_all_costs_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(monkeypatch, failing=("online", "offline"))
    said: list[str] = []
    run = WandbRun(info(tmp_path), said.append)
    for step in range(100):
        run.log({"step": step})
    run.close()
    assert len(said) == 2  # that there is no connection, that there is no run
    assert "continuing without wandb" in said[1]


def test_a_slow_connection_does_not_delay_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb = fake(monkeypatch, slow=True)
    monkeypatch.setattr(wandb_run, "_CAPACITY", 10)
    said: list[str] = []
    run = WandbRun(info(tmp_path), said.append)
    for step in range(20):
        run.log({"step": step})
    assert not wandb.inits  # all was taken before there is a connection
    wandb.connected.set()
    run.close()
    assert [row["step"] for row in wandb.rows] == list(range(10))
    assert said == ["wandb: sending is far behind; further metrics are dropped there"]


def test_close_waits_for_a_limited_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb = fake(monkeypatch, slow=True)
    monkeypatch.setattr(wandb_run, "CLOSE_TIMEOUT_S", 0.1)
    said: list[str] = []
    run = WandbRun(info(tmp_path), said.append)
    run.log({"step": 1})
    run.close()
    wandb.connected.set()
    assert said
    assert "wandb sync" in said[0]


def test_close_may_wait_for_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb = fake(monkeypatch, slow=True)
    said: list[str] = []
    run = WandbRun(info(tmp_path), said.append)
    run.log({"step": 1})
    run.close(0.1)
    wandb.connected.set()
    assert said[0].startswith("wandb: not everything was sent within 0 s")


@pytest.mark.slow
def test_a_signal_waits_ten_seconds_at_most_for_a_network_that_is_dead(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "wandb.py").write_text(
        "import time\nlogin = lambda **_: True\ninit = lambda **_: time.sleep(600)\n"
        "class Settings:\n    def __init__(self, **_): pass\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    for name, value in {"RANK": "0", "S2TRAIN_TEST_FAULT": "user_signal:0:2"}.items():
        monkeypatch.setenv(name, value)
    # In a fork, which has wandb already.
    planted = str(ROOT / "tests" / "training" / "planted.py")
    program = tmp_path / "program.py"
    program.write_text(
        f"import runpy, sys\nsys.modules.pop('wandb', None)\nrunpy.run_path({planted!r}, run_name='__main__')\n"
    )
    settings = [*SMALL, f"run_dir={tmp_path / 'run'}", "train.steps=6", "tracking.wandb=online"]
    done = run(str(program), *settings, processes=0)
    assert done.status == EXIT_REQUEUE, done.err
    assert "wandb: not everything was sent within 10 s" in done.out


@pytest.mark.slow
def test_offline_everything_ends_in_a_folder_of_the_runs_id(tmp_path: Path) -> None:
    said: list[str] = []
    run = WandbRun(info(tmp_path, "offline"), said.append)
    checkpoint = tmp_path / "iter_0000001"
    checkpoint.mkdir()
    run.log({"step": 1, "loss": 2.0})
    run.table("table", ["a", "b"], [[1, "x"]], place_of(1, 128))
    run.checkpoint(checkpoint, 1)
    run.close()
    assert said == []
    (folder,) = (tmp_path / "wandb").glob(f"offline-run-*-{run.id}")
    assert list(folder.glob("*.wandb"))
