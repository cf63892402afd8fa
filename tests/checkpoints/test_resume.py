"""A stopped run resumes bit for bit, and what doesn't fit its checkpoint is rejected."""

import json
import shutil
from pathlib import Path

import pytest
from megatron.core import dist_checkpointing

from s2train.checkpoints.folders import read_config, read_progress, remedy_for_damage
from s2train.checkpoints.integrity import damage
from s2train.files import FolderLock
from s2train.training.records import read_curves
from tests.data_fixtures import write_dataset
from tests.program import UNSAVED, Outcome, error_line, metrics, pretrain

pytestmark = [pytest.mark.slow]

STEPS = "train.steps=6"
REPORTS = "tracking.log_interval=2"  # the run stops between two reports


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two processes, stopped at step 3 of 6, with a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("stopped")
    settings = [STEPS, REPORTS, "train.exit_step=3", "checkpoint.interval=1", "checkpoint.keep=2"]
    pretrain(folder, *settings, processes=2).succeeded()
    return folder


def assert_rejected(outcome: Outcome, *words: str) -> None:
    assert outcome.status != 0
    line = error_line(outcome)
    assert all(word in line for word in words), line


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_only_the_last_checkpoints_are_kept(stopped: Path) -> None:
    assert [path.name for path in sorted((stopped / "checkpoints").glob("iter_*"))] == ["iter_0000002", "iter_0000003"]


def trace(folder: Path) -> dict[int, list[float]]:
    """What a run reports about its steps, by step, except their times."""
    names = ("loss", "held_out_loss", "grad_norm", "lr")
    return {record["step"]: [record[name] for name in names if name in record] for record in metrics(folder)}


WHOLE = [STEPS, REPORTS, "evaluation.interval=6", "evaluation.batches=1"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[float]]:
    """What an uninterrupted run on two processes reports."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    pretrain(folder, *WHOLE, UNSAVED, processes=2).succeeded()
    return trace(folder)


def test_a_resumed_run_equals_an_uninterrupted_one(
    stopped: Path, uninterrupted: dict[int, list[float]], tmp_path: Path
) -> None:
    pretrain(tmp_path, *WHOLE, UNSAVED, f"checkpoint.resume={stopped}", processes=2).succeeded()
    assert trace(tmp_path) == {step: uninterrupted[step] for step in (4, 6)}  # bit for bit
    assert trace(stopped)[2] == uninterrupted[2]


def test_reports_after_a_resume_name_the_steps_that_they_cover(stopped: Path, tmp_path: Path) -> None:
    resumed = pretrain(tmp_path, STEPS, REPORTS, UNSAVED, f"checkpoint.resume={stopped}", processes=0).succeeded()
    assert [record.get("timed_from") for record in metrics(tmp_path)] == [4, None]  # the first has step 3's loss too
    assert " ms/step from step 4 | " in resumed.out
    assert f"loss curve {tmp_path / 'loss.png'} from step 4" in resumed.out


BUDGET = ["train.tokens=6144", "optim.warmup_tokens=2048"]  # six steps of 8 × 128 tokens, two of them warm-up


def test_a_run_in_tokens_resumes_as_in_steps(
    stopped: Path, uninterrupted: dict[int, list[float]], tmp_path: Path
) -> None:
    resumed = pretrain(tmp_path, *BUDGET, *WHOLE[1:], f"checkpoint.resume={stopped}", processes=2).succeeded()
    assert trace(tmp_path) == {step: uninterrupted[step] for step in (4, 6)}
    saved = read_config(tmp_path / "checkpoints" / "iter_0000006")
    assert (saved.train.steps, saved.optim.warmup_steps) == (6, 2)
    assert (saved.train.tokens, saved.optim.warmup_tokens) == (6144, 2048)
    assert "budget        train.tokens=6,144 (6 steps), optim.warmup_tokens=2,048 (2 steps)\n" in resumed.out


def test_a_run_in_tokens_keeps_the_size_of_its_steps(stopped: Path, tmp_path: Path) -> None:
    start = [f"checkpoint.resume={stopped}", "optim.warmup_tokens=null", "train.global_batch_size=4"]
    resumed = pretrain(tmp_path, BUDGET[0], *start, processes=0)
    assert_rejected(resumed, "train.tokens=6144: ", "after 3,072 tokens", "train.tokens=null train.steps=9")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(["train.deterministic=true"], marks=pytest.mark.long),  # a CPU always is
        # in the last ones:
        pytest.param(["train.precision=bf16"], marks=pytest.mark.long),
        pytest.param(["parallel.tp=2", "parallel.sequence_parallel=true"], marks=pytest.mark.long),
        [
            "train.precision=bf16",
            "parallel.distributed_optimizer=false",
            "checkpoint.async_save=true",
            "parallel.tp=2",
            "parallel.sequence_parallel=true",
        ],
        ["parallel.pp=2", "parallel.vpp=2", "train.precision=bf16"],
    ],
    ids=" ".join,
)
def test_runs_with_other_settings_resume_bit_for_bit_too(change: list[str], tmp_path: Path) -> None:
    settings = ["train.steps=4", *WHOLE[1:], "evaluation.interval=4", *change]
    pretrain(tmp_path / "uninterrupted", *settings, "checkpoint.interval=3", processes=2).succeeded()
    start = f"checkpoint.resume={tmp_path / 'uninterrupted' / 'checkpoints' / 'iter_0000003'}"
    pretrain(tmp_path / "resumed", *settings, UNSAVED, start, processes=2).succeeded()
    expected = trace(tmp_path / "uninterrupted")
    assert trace(tmp_path / "resumed") == {4: expected[4]}


@pytest.mark.parametrize(
    "division",
    [
        "parallel.tp=2",
        "one process",
        *(pytest.param(x, marks=pytest.mark.long) for x in ("parallel.pp=2", "parallel.cp=2")),
    ],
)
def test_a_data_parallel_checkpoint_resumes_under_another_parallel_division(
    stopped: Path, uninterrupted: dict[int, list[float]], division: str, tmp_path: Path
) -> None:
    processes, more = (1, []) if division == "one process" else (2, [division])
    pretrain(tmp_path, *WHOLE, *more, UNSAVED, f"checkpoint.resume={stopped}", processes=processes).succeeded()
    for step in (4, 6):
        assert trace(tmp_path)[step] == pytest.approx(uninterrupted[step], rel=1e-5)


def test_starting_a_finished_run_again_does_nothing(stopped: Path) -> None:
    before = files(stopped)
    done = pretrain(stopped, STEPS, "train.exit_step=3", "tracking.log_interval=5").succeeded()
    assert "nothing to do" in done.out
    assert files(stopped) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["layout.pattern.stride=2"], ["layout.pattern.stride=2", "layout.pattern.stride=4"]),
        (["model.ffn_hidden_size=128"], ["model.ffn_hidden_size=128", "=96"]),
        (["parallel.distributed_optimizer=false"], ["parallel.distributed_optimizer=true"]),
        (["checkpoint.resume=never"], ["checkpoint.resume=never", "auto"]),
        (["checkpoint.resume={stopped}/checkpoints/iter_0000002"], ["iter_0000003", "run_dir"]),
        (["optim.lr=0.1"], ["optim.lr 0.003 → 0.1", "checkpoint.allow_changes=[optim.lr]", "another run_dir"]),
        (["train.steps=9"], ["optim.decay_steps 6 → 9", "optim.decay_steps=6 keeps"]),
        (["data.num_samples=72"], ["data.num_samples=72", "with 48", "Leave it unset"]),
        (["model.rotary_base=20000"], ["model.rotary_base=20000", "=10000", "checkpoint.new_data=true"]),
        (
            ["model.rope_scaling.kind=linear", "model.rope_scaling.factor=4"],
            ["kind=linear", "checkpoint.new_data=true"],
        ),
        (["seed=7"], ["seed=7", "1234"]),
        (["train.seq_length=64"], ["train.seq_length=64", "128"]),
        (
            ["run_dir={stopped}_new", "checkpoint.resume={stopped}", "train.exit_step=3"],
            ["train.exit_step=3", "or null"],
        ),
        (
            ["run_dir={stopped}_new", "checkpoint.resume={stopped}", "train.steps=3", "optim.decay_steps=6"],
            ["train.steps=3", "step 3"],
        ),
    ],
    ids=lambda value: value[0].partition("=")[0] if "=" in value[0] else "",
)
def test_what_does_not_fit_the_checkpoint_is_rejected_and_nothing_overwritten(
    stopped: Path, change: list[str], words: list[str]
) -> None:
    before = files(stopped)
    arguments = [setting.format(stopped=stopped) for setting in change]
    assert_rejected(pretrain(stopped, STEPS, *arguments, processes=0), *words)
    assert files(stopped) == before


def test_a_resumed_run_does_not_train_on_documents_that_were_held_out(stopped: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "other", "other text " * 100)
    resumed = pretrain(stopped, STEPS, f"data.valid_path={tmp_path / 'other'}", processes=0)
    assert_rejected(resumed, f"data.valid_path={tmp_path / 'other'}", "was trained with data.valid_path=null")


def test_a_new_phase_takes_other_data_from_their_beginning(stopped: Path, tmp_path: Path) -> None:
    changes = ["train.seq_length=64", "checkpoint.new_data=true", "model.rotary_base=20000"]
    start = f"checkpoint.resume={stopped}"
    pretrain(tmp_path, STEPS, start, *changes, "train.exit_step=4", processes=0).succeeded()
    progress = read_progress(tmp_path / "checkpoints" / "iter_0000004")
    assert (progress.step, progress.consumed_samples) == (4, 8)
    # The samples of its three steps: in a longer order, few documents would repeat its first samples.
    assert progress.order["data.num_samples"] == 24
    pretrain(tmp_path, STEPS, start, *changes, "checkpoint.resume=auto", processes=0).succeeded()
    assert read_progress(tmp_path / "checkpoints" / "iter_0000006").consumed_samples == 24


def test_a_new_phase_scales_rope_and_logs_it_as_a_change(stopped: Path, tmp_path: Path) -> None:
    scaling = "model.rope_scaling={kind:yarn,factor:4,original_length:128}"
    phase = [f"checkpoint.resume={stopped}", "checkpoint.new_data=true", scaling, "train.seq_length=512"]
    done = pretrain(tmp_path, STEPS, *phase, "train.exit_step=4", processes=0).succeeded()
    assert "changed since iter_0000003: model.rope_scaling.kind none → yarn" in done.out
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (changed,) = [record["settings"] for record in records if record.get("event") == "changed settings"]
    assert changed["model.rope_scaling.factor"] == [None, 4.0]
    assert changed["model.rope_scaling.attention_factor"] == [None, pytest.approx(1.1386, abs=1e-4)]
    # a setting left to its default is the same: the run resumes
    same = "model.rope_scaling={kind:yarn,factor:4,original_length:128,beta_slow:1,truncate:true}"
    again = pretrain(
        tmp_path, STEPS, *phase[:2], same, *phase[3:], "train.exit_step=5", UNSAVED, processes=0
    ).succeeded()
    assert "rope_scaling" not in again.out


def test_a_new_phase_may_become_dense_where_it_is_allowed(stopped: Path, tmp_path: Path) -> None:
    phase = [f"checkpoint.resume={stopped}", "checkpoint.new_data=true", "layout.layers=D", "train.exit_step=4"]
    rejected = pretrain(tmp_path, STEPS, *phase, processes=0)
    assert_rejected(rejected, "layout.layers=D", "checkpoint.allow_changes=[layout.layers]")
    pretrain(tmp_path, STEPS, *phase, "checkpoint.allow_changes=[layout.layers]", processes=0).succeeded()
    assert sorted(read_curves(tmp_path / "metrics.jsonl").train) == [4]
    assert read_config(tmp_path / "checkpoints" / "iter_0000004").layout.layers == "D"


def test_outside_a_new_phase_no_consent_changes_the_layout(stopped: Path, tmp_path: Path) -> None:
    branch = [f"checkpoint.resume={stopped}", "layout.layers=D", "checkpoint.allow_changes=true"]
    assert_rejected(pretrain(tmp_path, STEPS, *branch, processes=0), "layout.layers=D", "was trained with")


def test_an_incomplete_save_is_not_a_checkpoint(stopped: Path, tmp_path: Path) -> None:
    (stopped / "checkpoints" / ".iter_0000009.0a1b2c3d.partial").mkdir()
    (stopped / "checkpoints" / "latest_checkpointed_iteration.txt").unlink()
    done = pretrain(tmp_path, STEPS, "train.exit_step=4", f"checkpoint.resume={stopped}", processes=0).succeeded()
    assert "iter_0000003" in done.out
    assert sorted(read_curves(tmp_path / "metrics.jsonl").train) == [4]


def test_only_intact_checkpoints_are_recommended_instead_of_a_damaged_one(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped / "checkpoints", tmp_path / "checkpoints")
    last, older = (tmp_path / "checkpoints" / name for name in ("iter_0000003", "iter_0000002"))
    assert damage(last) is None
    assert str(older) in remedy_for_damage(last)
    (older / ".metadata").unlink()
    assert ".metadata" in str(damage(older))
    assert "No older checkpoint there is intact" in remedy_for_damage(last)


def test_changed_hyperparameters_apply_after_a_resume(stopped: Path, tmp_path: Path) -> None:
    changes = ["optim.lr=5e-4", "optim.min_lr=5e-4", "optim.beta2=0.5", "train.exit_step=4"]
    done = pretrain(tmp_path, STEPS, f"checkpoint.resume={stopped}", *changes, processes=0).succeeded()
    assert "changed since iter_0000003: optim.lr 0.003 → 0.0005" in done.out.splitlines()
    assert metrics(tmp_path)[-1]["lr"] == pytest.approx(5e-4)
    checkpoint = tmp_path / "checkpoints" / "iter_0000004"
    assert read_config(checkpoint).optim.lr == 5e-4
    saved = dist_checkpointing.load_common_state_dict(str(checkpoint))["optimizer"]["optimizer"]["param_groups"]
    assert all(tuple(group["betas"]) == (0.9, 0.5) for group in saved)


def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(tmp_path: Path) -> None:
    changes = ["optim.lr=1e20", "checkpoint.interval=1", "checkpoint.keep=1", "train.max_skipped_steps=2"]
    done = pretrain(tmp_path, STEPS, *changes, processes=0)
    assert_rejected(done, "Nothing was saved", "train.max_skipped_steps=2", "optim.lr", "checkpoint.resume=")
    assert sum("| skipped: loss" in line for line in done.out.splitlines()) == 3
    assert len(list((tmp_path / "checkpoints").glob("iter_*"))) == 1


def test_a_second_job_in_a_run_folder_is_rejected(stopped: Path) -> None:
    other = FolderLock(stopped / ".lock")
    assert_rejected(pretrain(stopped, STEPS, processes=0), "run_dir=", "another job")
    other.release()
