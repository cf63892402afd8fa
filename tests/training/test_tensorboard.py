"""TensorBoard gets a run's metrics under wandb's names."""

import importlib.util
from pathlib import Path

import pytest

from s2train.errors import ConfigError
from s2train.planning import compose_run
from s2train.training import tensorboard
from s2train.training.tensorboard import TensorBoard, check_tensorboard

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard isn't installed"
)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


@needs_tensorboard
def test_numbers_of_a_report_are_written_by_name_and_step(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, 0)
    board.log(1, {"train/loss": 5.5, "data/consumed_tokens": 128, "other": "text", "missing": None})
    board.log(2, {"train/loss": 4.5})
    board.close()
    assert scalars(tmp_path) == {"train/loss": [(1, 5.5), (2, 4.5)], "data/consumed_tokens": [(1, 128.0)]}


@needs_tensorboard
def test_a_resumed_run_replaces_what_a_killed_one_wrote_after_its_checkpoint(tmp_path: Path) -> None:
    for start, last in ((0, 5), (2, 4)):
        board = TensorBoard(tmp_path, start)
        for step in range(start + 1, last + 1):
            board.log(step, {"train/loss": 10.0 * start + step})
        board.close()
    assert scalars(tmp_path)["train/loss"] == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]


def test_a_run_is_rejected_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    settings = ["+model=tiny_hybrid", "tracking.tensorboard="]
    check_tensorboard(compose_run([settings[0], settings[1] + "false"]))
    with pytest.raises(ConfigError, match=r"tracking.tensorboard=true: .* not installed.*extra `tensorboard`"):
        check_tensorboard(compose_run([settings[0], settings[1] + "true"]))
