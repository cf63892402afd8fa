"""A plan reports where the run would start, and a checkpoint that the run would reject."""

import json
import shutil
from pathlib import Path

import pytest

from s2train.checkpoints.folders import read_progress
from s2train.checkpoints.planned_start import planned_start
from s2train.checkpoints.resume import find_start
from s2train.config import PretrainConfig
from s2train.errors import ConfigError
from s2train.planning import compose_run
from tests.data_fixtures import write_dataset
from tests.program import SMALL, error_line, pretrain

pytestmark = [pytest.mark.slow]


@pytest.mark.parametrize(
    ("named", "settings"),
    [
        ("checkpoint.resume", ["checkpoint.resume={}"]),
        (
            "layout.kinds.E.teacher",
            ["layout.layers=DE", "+layout.kinds.E={{kind:block_selection,top_k:1,teacher:{}}}"],
        ),
    ],
)
def test_a_plan_ends_with_the_error_of_a_missing_checkpoint(named: str, settings: list[str], tmp_path: Path) -> None:
    done = pretrain(tmp_path / "run", "plan=true", *(text.format(tmp_path) for text in settings), processes=0)
    assert done.status == 2
    assert "It fits." in done.out
    assert error_line(done).startswith(f"error: {named}={tmp_path}: no checkpoint there.")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a run's checkpoint after its last step, the second."""
    folder = tmp_path_factory.mktemp("trained")
    pretrain(folder, "train.steps=2", "optim.warmup_steps=1", processes=0).succeeded()
    return folder


def composed(run_dir: Path, *settings: str) -> PretrainConfig:
    own = [*SMALL, "train.steps=2", "optim.warmup_steps=1", f"run_dir={run_dir}"]
    return compose_run([*own, *settings])


def start(run_dir: Path, *settings: str) -> str:
    return planned_start(composed(run_dir, *settings))


def test_a_resumed_run_is_planned_from_its_checkpoint(run_dir: Path) -> None:
    first, second = start(run_dir).splitlines()
    assert first == f"start         resuming from {run_dir / 'checkpoints' / 'iter_0000002'}"
    assert second.strip() == "nothing to do: it is at step 2 of 2"
    resume = (f"checkpoint.resume={run_dir}", "checkpoint.weights_only=true", "layout.layers=D")
    found = start(run_dir.parent / "other", *resume)
    assert f"new run in {run_dir.parent / 'other'}, with the weights of {run_dir}" in found


def test_a_plan_rejects_what_the_run_would(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model.hidden_size=128: .* with model.hidden_size=64. .*resume=auto"):
        start(run_dir.parent / "other", f"checkpoint.resume={run_dir}", "model.hidden_size=128")
    with pytest.raises(ConfigError, match=r"layout.layers=DSSS. .* weights alone with checkpoint.weights_only=true"):
        start(run_dir.parent / "other", f"checkpoint.resume={run_dir}", "layout.layers=D")
    with pytest.raises(ConfigError, match=r"^checkpoint.new_data=true: .* Set checkpoint.resume=RUN_DIR too"):
        start(run_dir.parent / "other", "checkpoint.new_data=true")
    with pytest.raises(ConfigError, match=r"^optim.lr=0.1: .*'checkpoint.allow_changes=\[optim.lr\]"):
        start(run_dir, "optim.lr=0.1")


def test_another_precision_is_rejected_without_a_distributed_optimizer(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "plain")
    config = tmp_path / "plain" / "checkpoints" / "iter_0000002" / "config.yaml"
    config.write_text(config.read_text().replace("distributed_optimizer: true", "distributed_optimizer: false"))
    others = [p for p in ("fp32", "bf16") if f"precision: {p}\n" not in config.read_text()]
    settings = ["parallel.distributed_optimizer=false", f"train.precision={others[0]}", "checkpoint.allow_changes=true"]
    with pytest.raises(ConfigError, match=r"^train\.precision=.* holds optimizer state saved with"):
        start(tmp_path / "plain", *settings)


def test_a_plan_without_its_data_compares_all_but_their_order(run_dir: Path) -> None:
    found = start(run_dir.parent / "other", f"checkpoint.resume={run_dir}", "data.path=gone", "train.steps=3")
    assert found.split(maxsplit=1)[1] == "the data's order is not compared with a checkpoint's: gone.idx is missing"


def test_held_out_data_that_are_not_the_checkpoints_are_named(run_dir: Path, tmp_path: Path) -> None:
    held_out = write_dataset(tmp_path / "held-out", "b" * 4000)
    shutil.copytree(run_dir, tmp_path / "again")
    checkpoint = tmp_path / "again" / "checkpoints" / "iter_0000002"
    assert read_progress(checkpoint).held_out == []
    # As if it had been trained with them.
    config, progress = checkpoint / "config.yaml", checkpoint / "progress.json"
    config.write_text(config.read_text().replace("valid_path: null", f"valid_path: {held_out}"))
    saved = json.loads(progress.read_text())
    saved["order"]["data.split"] = "1,0,0"
    saved["held_out"] = find_start(composed(tmp_path / "new", f"data.valid_path={held_out}")).progress.held_out
    progress.write_text(json.dumps(saved))

    def said(valid_path: str) -> list[str]:
        lines = start(tmp_path / "again", f"data.valid_path={valid_path}", "train.steps=3", "optim.decay_steps=2")
        return [line.strip() for line in lines.splitlines() if "held-out losses" in line]

    warning = "warning: held-out losses before and after step 2 are of different texts"
    shutil.copytree(tmp_path, tmp_path / "moved", ignore=shutil.ignore_patterns("again"))
    assert said(held_out) == said(f"{tmp_path}/moved/held-out") == []
    other = write_dataset(tmp_path / "other", "c" * 4000)
    assert said(other) == [f"{warning}: {held_out} before, {other} after"]
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{other}{suffix}", f"{held_out}{suffix}")
    assert said(held_out) == [f"{warning}: {held_out} before, other contents of these files after"]
    del saved["held_out"]  # earlier versions
    progress.write_text(json.dumps(saved))
    assert said(held_out) == []


@pytest.mark.parametrize("way", ["new_data", "weights_only"])
def test_a_start_from_another_run_is_not_ignored_in_a_folder_that_has_checkpoints(
    way: str, run_dir: Path, tmp_path: Path
) -> None:
    settings = [f"checkpoint.{way}=true", f"checkpoint.resume={run_dir}", "train.steps=3"]
    with pytest.raises(ConfigError, match=rf"^checkpoint\.{way}=true: would have no effect.* Set another run_dir"):
        start(run_dir, *settings)
    # The same command, started again after the run saved.
    again = tmp_path / "again"
    shutil.copytree(run_dir, again)
    config = again / "checkpoints" / "iter_0000002" / "config.yaml"
    text = config.read_text().replace(f"{way}: false", f"{way}: true")
    config.write_text(text.replace("resume: auto", f"resume: {run_dir}"))
    assert f"resuming from {again}" in start(again, *settings, "optim.decay_steps=2")


@pytest.mark.parametrize("way", ["checkpoint.new_data=true", "checkpoint.weights_only=true"])
def test_weights_meet_another_tokenizer_only_where_it_is_allowed(way: str, run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    settings = [f"checkpoint.resume={run_dir}", way, f"data.tokenizer={tmp_path / 'other.json'}", "train.steps=3"]
    problem = (
        r"^data.tokenizer=.*other.json: .*iter_0000002 was trained with bytes\. .*allow_changes=\[data.tokenizer\]"
    )
    with pytest.raises(ConfigError, match=problem):
        start(tmp_path / "run", *settings)
    assert str(run_dir) in start(tmp_path / "run", *settings, "checkpoint.allow_changes=[data.tokenizer]")
