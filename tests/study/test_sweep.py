import json
from pathlib import Path

import pytest

from s2train.data.indexed import Metadata
from s2train.errors import ConfigError
from s2train.planning import compose_run
from s2train.study import sweep
from s2train.study.files import Folders
from s2train.study.sweep import GRID, Trial


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path, Path("launch"))


def finish(folders: Folders, trial: Trial, loss: float) -> None:
    run = folders.root / "sweep" / trial.name
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(json.dumps({"step": trial.steps, "loss": 1.0, "held_out_loss": loss}) + "\n")
    sweep.record(folders, trial)


def test_the_lowest_held_out_loss_is_chosen(folders: Folders) -> None:
    for number, trial in enumerate(map(Trial, GRID)):
        finish(folders, trial, 3.0 + abs(number - 2))
    assert sweep.chosen(folders) == GRID[2]


def test_an_unfinished_sweep_chooses_nothing(folders: Folders) -> None:
    finish(folders, Trial(GRID[0]), 3.0)
    with pytest.raises(ConfigError, match=f"lacks {len(GRID) - 1} of {len(GRID)} trials.*quality_study.py sweep"):
        sweep.chosen(folders)


def test_a_trial_has_its_own_schedule_to_the_end(folders: Folders) -> None:
    for trial in map(Trial, GRID):
        cfg = compose_run(trial.settings(folders))
        assert cfg.train.steps * trial.recipe.batch_tokens == pytest.approx(sweep.TOKENS, rel=0.02)
        assert (cfg.optim.lr, cfg.optim.decay_steps, cfg.layout.layers) == (trial.recipe.lr, None, "D")
        assert cfg.evaluation.seed is None  # as in trials that earlier versions recorded
        assert cfg.train.global_batch_size * cfg.train.seq_length == trial.recipe.batch_tokens


def test_processes_side_by_side_share_the_trials(folders: Folders) -> None:
    first, second = map(Trial, GRID[:2])
    with sweep.claimed(folders, first) as mine, sweep.claimed(folders, first) as taken:
        assert (mine, taken) == (True, False)
        with sweep.claimed(folders, second) as other:
            assert other
        assert sweep.running(folders) == [first.name]
    assert sweep.running(folders) == []


def test_a_finished_trial_is_not_run_again(folders: Folders) -> None:
    first, second = map(Trial, GRID[:2])
    finish(folders, first, 3.0)
    with sweep.claimed(folders, first) as again, sweep.claimed(folders, second) as other:
        assert (again, other) == (False, True)
    assert sweep.running(folders) == []


def test_the_sweep_says_on_how_many_tokens_it_ran(folders: Folders) -> None:
    folders.data.mkdir(parents=True)
    metadata = Metadata("bytes", "bytes", 257, 1, 1234, 5.0, {})
    metadata.write(folders.train_data.with_name("train.json"))
    finish(folders, Trial(GRID[0]), 3.0)
    assert json.loads(folders.sweep.read_text())["data_tokens"] == 1234


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"trials": [',
        "{}",
        '{"trials": [{"name": "lr0.0006-batch131072"}]}',
        '{"trials": [{"name": "lr0.0006-batch131072", "lr": 6e-4, "batch_tokens": 131072, "held_out_loss": "3"}]}',
    ],
)
def test_a_cut_result_of_the_sweep_is_named(content: str, folders: Folders) -> None:
    folders.results.mkdir()
    folders.sweep.write_text(content)
    with pytest.raises(ConfigError, match=r"sweep\.json: is no result of this study.*Move the file away"):
        sweep.chosen(folders)
