"""Launchers check all jobs before any starts, skip finished ones and return losses to the sweeper."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn
from hydra.types import HydraContext, RunMode
from omegaconf import OmegaConf, open_dict

from s2train import config
from s2train.sweeps.jobs import Job, Status, read_record
from s2train.sweeps.local import LocalLauncher

CONF = Path(__file__).parents[2] / "conf"
MODEL = "+model=tiny_hybrid"


@dataclass
class Sweeper:
    """Passes batches of jobs to a launcher whose jobs train nothing and get the losses given here."""

    launcher: LocalLauncher
    losses: dict[str, float]
    ran: list[str] = field(default_factory=list)

    def launch(self, *jobs: Sequence[str]) -> list[Any]:
        self.launcher.run = self._run  # type: ignore[method-assign]
        returns: Sequence[JobReturn] = self.launcher.launch([[MODEL, *job] for job in jobs], 0)
        return [returned.return_value for returned in returns]

    def _run(self, jobs: list[Job]) -> None:
        for job in jobs:
            self.ran.append(job.label)
            if job.label not in self.losses:
                job.status = Status.FAILED
                continue
            job.folder.mkdir(parents=True)
            speed = {"step_time_s": 1.0, "tokens_per_s": 1.0, "model_tflops": 1.0, "memory_gib": 0.0}
            last = {"step": 400, "loss": 9.0, "held_out_loss": self.losses[job.label], **speed}
            records = [last, {"event": "checkpoint", "step": 400}]
            (job.folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            job.status = Status.FINISHED


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[Any]:
    """Function that makes a sweeper in `tmp_path` from settings as on the command line."""
    config.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):

        def make(
            *arguments: str, losses: dict[str, float] | None = None, params: Any = None, **settings: Any
        ) -> Sweeper:
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            overrides = [MODEL, f"hydra.sweep.dir={tmp_path}/sweep", *arguments]
            composed = hydra.compose_config("pretrain", overrides, RunMode.MULTIRUN)
            composed.hydra.sweeper.params = params
            launcher = LocalLauncher(**settings)
            context = HydraContext(config_loader=hydra.config_loader, callbacks=None)  # type: ignore[arg-type]
            launcher.setup(hydra_context=context, task_function=lambda _: None, config=composed)
            return Sweeper(launcher, losses or {})

        yield make


def test_each_job_gets_its_loss_and_a_failed_one_none(sweep: Any) -> None:
    sweeper = sweep("seed=1,2,3", losses={"seed=1": 1.5, "seed=3": 2.5})
    assert sweeper.launch(["seed=1"], ["seed=2"], ["seed=3"]) == [1.5, None, 2.5]


def test_batches_of_one_sweep_share_a_record(sweep: Any, tmp_path: Path) -> None:
    sweeper = sweep("seed=1,2", losses={"seed=1": 1.5, "seed=2": 2.5})
    assert sweeper.launch(["seed=1"]) + sweeper.launch(["seed=2"]) == [1.5, 2.5]
    assert [job.label for job in read_record(tmp_path / "sweep")] == ["seed=1", "seed=2"]


def test_a_sweep_over_tokens_runs_the_steps_that_follow(sweep: Any, tmp_path: Path) -> None:
    swept = ["train.tokens=204_800", "train.tokens=409_600"]  # steps of 4,096 tokens
    sweep("train.tokens=204_800,409_600").launch(*([one] for one in swept))
    assert [job.last_step for job in read_record(tmp_path / "sweep")] == [50, 100]


def test_a_sweep_rejects_jobs_whose_tokens_contradict_their_steps(
    sweep: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sweep("train.tokens=204_800,409_600", "train.steps=100").launch(
            *([f"train.tokens={tokens}", "train.steps=100"] for tokens in ("204_800", "409_600"))
        )
    assert "error: train.tokens=204_800: train.steps=100: " in (err := capsys.readouterr().err)
    assert "1 of 2 jobs can't run" in err


def test_a_sweep_whose_folder_cannot_be_made_is_rejected_before_hydra_makes_it(
    sweep: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sweep("seed=1,2", "hydra.sweep.dir=/proc/sweep")
    assert "error: hydra.sweep.dir=/proc/sweep: /proc can't be written" in capsys.readouterr().err


def learning(sweep: Any, trials: int, *arguments: str, **settings: Any) -> Sweeper:
    """Make a sweeper that learns from the losses of `trials` trials."""
    sweeper: Sweeper = sweep("seed=1,2", *arguments, **settings)
    with open_dict(sweeper.launcher.config):
        sweeper.launcher.config.hydra.sweeper = OmegaConf.create({"n_trials": trials})
    return sweeper


def test_a_search_without_any_loss_ends_in_one_line(sweep: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sweeper = learning(sweep, 2)
    assert sweeper.launch(["seed=1"]) == [None]
    with pytest.raises(SystemExit) as ended:
        sweeper.launch(["seed=2"])
    assert ended.value.code == 1
    assert "error: none of 2 jobs has a loss" in capsys.readouterr().err


def test_a_search_with_some_losses_continues(sweep: Any) -> None:
    sweeper = learning(sweep, 2, losses={"seed=1": 1.5})
    assert sweeper.launch(["seed=1"], ["seed=2"]) == [1.5, None]


def test_a_planned_search_ends_with_status_0_after_its_first_batch(sweep: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        learning(sweep, 9, "plan.show=true").launch(["seed=1", "plan.show=true"])
    assert ended.value.code == 0


def test_a_search_that_ends_early_prints_its_results(sweep: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sweeper = sweep("train.seq_length=256,8", losses={"train.seq_length=256": 1.5})
    sweeper.launch(["train.seq_length=256"])
    with pytest.raises(SystemExit):
        sweeper.launch(["train.seq_length=8"])
    assert "1.5000" in capsys.readouterr().out


def test_a_repeated_proposal_runs_once(sweep: Any) -> None:
    sweeper = sweep("seed=1,2", losses={"seed=1": 1.5})
    assert sweeper.launch(["seed=1"], ["seed=1"]) + sweeper.launch(["seed=1"]) == [1.5] * 3
    assert sweeper.ran == ["seed=1"]


def test_the_same_sweep_again_runs_unfinished_jobs(sweep: Any) -> None:
    jobs = [["seed=1"], ["seed=2"]]
    sweep("seed=1,2", losses={"seed=1": 1.5}).launch(*jobs)
    again = sweep("seed=1,2", losses={"seed=2": 2.5})
    assert again.launch(*jobs) == [1.5, 2.5]
    assert again.ran == ["seed=2"]


def test_another_sweep_into_the_same_folder_keeps_the_jobs_of_the_first(sweep: Any, tmp_path: Path) -> None:
    sweep("seed=1,2", losses={"seed=1": 1.5}).launch(["seed=1"])
    sweep("seed=1", "train.steps=800", losses={"seed=1": 2.5}).launch(["seed=1", "train.steps=800"])
    first, second = read_record(tmp_path / "sweep")
    assert (first.label, first.is_earlier) == ("seed=1", True)
    assert (second.label, second.is_earlier) == ("seed=1 train.steps=800", False)


def test_a_longer_run_is_another_job(sweep: Any) -> None:
    sweep("seed=1,2", losses={"seed=1": 1.5}).launch(["seed=1"])
    again = sweep("seed=1,2", "train.steps=800")
    again.launch(["seed=1", "train.steps=800"])
    assert again.ran == ["seed=1"]


def test_invalid_jobs_keep_all_from_starting_and_are_all_listed(sweep: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sweeper = sweep("train.seq_length=8,256,4", losses={"train.seq_length=256": 1.5})
    with pytest.raises(SystemExit) as ended:
        sweeper.launch(["train.seq_length=8"], ["train.seq_length=256"], ["train.seq_length=4"])
    assert ended.value.code == 2
    assert sweeper.ran == []
    printed = capsys.readouterr().err
    assert "error: train.seq_length=8: the sequence is shorter than a block" in printed
    assert "error: train.seq_length=4: the" in printed
    assert "2 of 3 jobs can't run" in printed


def test_a_job_s_error_names_each_swept_setting_once(sweep: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sweep("seed=1,2", "train.seq_length=8").launch(["seed=2", "train.seq_length=8"])
    with pytest.raises(SystemExit):
        sweep("seed=1,2", "train.seq_length=8,256").launch(["seed=1", "train.seq_length=8"])
    printed = [line for line in capsys.readouterr().err.splitlines() if "shorter than a block" in line]
    assert [line.partition(": the sequence")[0] for line in printed] == [
        "error: seed=2: train.seq_length=8",
        "error: seed=1: train.seq_length=8",
    ]


def test_skip_invalid_runs_the_rest(sweep: Any, tmp_path: Path) -> None:
    sweeper = sweep("train.seq_length=8,256", losses={"train.seq_length=256": 1.5}, skip_invalid=True)
    assert sweeper.launch(["train.seq_length=8"], ["train.seq_length=256"]) == [None, 1.5]
    assert [job.status for job in read_record(tmp_path / "sweep")] == [Status.REJECTED, Status.FINISHED]


def test_an_unknown_config_name_is_rejected_too(sweep: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sweep("layout=dense,dens").launch(["layout=dens"])
    assert "Could not find 'layout/dens'" in capsys.readouterr().err


def test_a_plan_is_reported_and_nothing_started(sweep: Any, tmp_path: Path) -> None:
    sweeper = sweep("layout=dense,s2_b16_l4_v4", "plan.show=true")
    assert sweeper.launch(["layout=dense", "plan.show=true"], ["layout=s2_b16_l4_v4", "plan.show=true"]) == [None, None]
    assert sweeper.ran == []
    dense, sparse = read_record(tmp_path / "sweep")
    assert (dense.density, dense.layers, dense.status) == (1, "DDDD", Status.PLANNED)
    assert sparse.density is not None
    assert sparse.density < 1


def test_a_plan_of_a_sweep_compares_memory_and_speed(sweep: Any, tmp_path: Path) -> None:
    fixed = ["+plan.device=h100", "train.precision=bf16", "train.seq_length=16384"]
    sweeper = sweep(*fixed, "layout=dense,s2_b16_l4_v4")
    sweeper.launch(*([*fixed, f"layout={name}"] for name in ("dense", "s2_b16_l4_v4")))
    dense, sparse = read_record(tmp_path / "sweep")
    assert dense.planned_memory_gib == pytest.approx(sparse.planned_memory_gib, rel=0.01)
    assert dense.predicted_tokens_per_s < sparse.predicted_tokens_per_s


def test_a_plan_rejects_the_checkpoint_that_a_job_would(
    sweep: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume = f"checkpoint.resume={tmp_path}"
    sweeper = sweep(f"checkpoint.resume=never,{tmp_path}", "plan.show=true")
    with pytest.raises(SystemExit):
        sweeper.launch(["checkpoint.resume=never", "plan.show=true"], [resume, "plan.show=true"])
    assert f"error: {resume}: no checkpoint there." in (err := capsys.readouterr().err)
    assert "1 of 2 jobs can't run" in err


def test_jobs_are_one_group_in_wandb_by_default(sweep: Any, tmp_path: Path) -> None:
    sweeper = sweep("seed=1,2")
    sweeper.launch(["seed=1"], ["seed=2", "tracking.group=mine"])
    first, second = read_record(tmp_path / "sweep")
    assert "tracking.group='sweep'" in first.arguments
    assert "tracking.group=mine" in second.arguments
    assert "tracking.group='sweep'" not in second.arguments


def test_values_of_the_sweepers_settings_label_the_jobs(sweep: Any, tmp_path: Path) -> None:
    sweep(params={"seed": "1,2"}).launch(["seed=1"])
    assert [job.label for job in read_record(tmp_path / "sweep")] == ["seed=1"]


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (["run_dir=runs/mine"], {}, "run_dir=…: each job has its own folder. Set hydra.sweep.dir"),
        ([], {"n_jobs": 0}, "hydra.launcher.n_jobs=0"),
        ([], {"nproc_per_node": -1}, "hydra.launcher.nproc_per_node=-1"),
    ],
)
def test_a_sweep_that_cannot_work_is_rejected(
    sweep: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], settings: dict[str, int], message: str
) -> None:
    with pytest.raises(SystemExit):
        sweep(*arguments, **settings)
    assert message in capsys.readouterr().err


def test_a_sweep_without_a_job_is_rejected(sweep: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sweeper = sweep("layout=glob(zz*)")
    with pytest.raises(SystemExit):
        sweeper.launch()
    assert "error: -m=multirun: the sweep has no job: a glob matches no file" in capsys.readouterr().err


def test_the_error_inside_torchrun_says_how_to_sweep(
    sweep: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        sweep()
    assert "python launch/pretrain.py -m" in capsys.readouterr().err


def test_jobs_are_planned_for_the_gpus_in_their_settings(sweep: Any) -> None:
    large = ["train.micro_batch_size=8192", "train.global_batch_size=65536"]  # more than this machine's memory
    sweeper = sweep(*large, "plan.device=h200,l40s")
    with pytest.raises(SystemExit):
        sweeper.launch(*([*large, f"plan.device={name}", "plan.count=8"] for name in ("h200", "l40s")))
    h200, l40s = sweeper.launcher.jobs.values()
    assert (h200.status, h200.layers) == (Status.PLANNED, "DSSS")
    assert l40s.status is Status.REJECTED
    assert "NVIDIA L40S has 44.3" in l40s.error
