"""A sweep's folder gives its table, CSV file and picture."""

import csv
import json
import os
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from rich.console import Console

from s2train.config import EvaluationConfig, ModelConfig, PretrainConfig, TrainConfig
from s2train.sweeps.jobs import Job, Status, changed_setting, last_error, read_record, relabel, write_record
from s2train.sweeps.report import report


def made(sweep: Path, layout: str, seed: int, *, steps: int = 20, saved: int | None = 20, loss: float = 2.0) -> Job:
    """A job whose run has reported every ten steps, and saved at step `saved`."""
    folder = sweep / f"{layout}-{seed}"
    folder.mkdir()
    records: list[dict[str, object]] = [{"event": "config", "tokens_per_step": 100}]
    for step in range(10, steps + 1, 10):
        speed = {"step_time_s": 0.5, "tokens_per_s": 200.0 + seed, "model_tflops": 1.0, "memory_gib": 0.0}
        records.append({"step": step, "loss": loss + 1 / step, "held_out_loss": loss + seed, **speed})
    if saved is not None:
        records.append({"event": "checkpoint", "step": saved})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    swept = {"layout": layout, "seed": str(seed)}
    return Job(folder, f"layout={layout} seed={seed}", swept, [], "DSSS", 0.5, 20, Status.FINISHED)


def printed(sweep: Path) -> tuple[bool, str]:
    out = StringIO()
    return report(sweep, Console(file=out, width=140)), out.getvalue()


def test_a_job_is_finished_when_its_last_checkpoint_is_saved(tmp_path: Path) -> None:
    assert made(tmp_path, "a", 1).is_finished
    assert not made(tmp_path, "a", 2, saved=10).is_finished
    assert not made(tmp_path, "a", 3, saved=None).is_finished
    assert not Job(tmp_path / "none", "", {}, [], last_step=20).is_finished


def test_a_job_that_saves_nothing_is_finished_when_its_last_step_is_reported(tmp_path: Path) -> None:
    for seed, steps in enumerate((20, 10)):
        job = made(tmp_path, "a", seed, steps=steps, saved=None)
        (job.folder / "config.yaml").write_text("checkpoint: {save: false}\n")
        assert job.is_finished == (steps == 20)


def test_a_changed_setting_of_a_finished_run_is_found(tmp_path: Path) -> None:
    cfg = PretrainConfig(model=ModelConfig(name="m"), train=TrainConfig(steps=20), run_dir=str(tmp_path))
    OmegaConf.save(OmegaConf.structured(cfg), tmp_path / "config.yaml")
    assert changed_setting(tmp_path, cfg) is None
    cfg.tracking.wandb = "offline"
    cfg.run_dir = "moved"
    cfg.data.end_token = "<|im_end|>"  # a run saves the one recorded in its data
    cfg.data.num_workers, cfg.train.timeout_minutes = 7, 7.0
    assert changed_setting(tmp_path, cfg) is None
    cfg.evaluation.batches = 7  # a resumed run may change it, and measures another loss
    assert changed_setting(tmp_path, cfg) == f"evaluation.batches={EvaluationConfig.batches}"
    cfg.evaluation.batches = EvaluationConfig.batches
    cfg.optim.lr = 0.5
    assert changed_setting(tmp_path, cfg) == "optim.lr=0.0003"
    assert changed_setting(tmp_path / "none", cfg) is None


def test_the_loss_of_a_job_is_the_held_out_loss_or_else_the_last(tmp_path: Path) -> None:
    job = made(tmp_path, "a", 1)
    assert (job.loss(), job.loss_text()) == (3.0, "held out 3.0000")
    metrics = job.folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("held_out_loss", "other"))
    assert (job.loss(), job.loss_text()) == (2.05, "loss 2.0500")
    job.status = Status.FAILED
    assert (job.loss(), job.loss_text()) == (None, "no loss")


def test_a_training_loss_does_not_stand_for_a_held_out_loss_that_is_not_finite(tmp_path: Path) -> None:
    job = made(tmp_path, "a", 1)
    metrics = job.folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"held_out_loss": 3.0', '"held_out_loss": null'))
    assert (job.loss(), job.loss_text()) == (None, "no loss")


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    jobs = [made(tmp_path, "a", 1), Job(tmp_path / "b", "b", {}, ["x=1"], status=Status.REJECTED, error="why")]
    write_record(tmp_path, jobs)
    assert read_record(tmp_path) == jobs


def test_results_are_in_the_table_the_csv_and_a_picture(tmp_path: Path) -> None:
    write_record(tmp_path, [made(tmp_path, layout, seed) for layout in ("a", "b") for seed in (1, 2)])
    good, text = printed(tmp_path)
    assert good
    assert "layout=b seed=2" in text
    assert "4.0000" in text
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [(row["layout"], row["seed"], float(row["held_out_loss"])) for row in rows] == [
        ("a", "1", 3.0),
        ("a", "2", 4.0),
        ("b", "1", 3.0),
        ("b", "2", 4.0),
    ]
    assert {row["density"] for row in rows} == {"0.5"}
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_planned_sweep_shows_memory_and_predicted_speed(tmp_path: Path) -> None:
    planned = {"planned_memory_gib": 53.25, "predicted_step_time_s": 4.0, "predicted_tokens_per_s": 524288.0}
    write_record(tmp_path, [Job(tmp_path / "a", "layout=a", {"layout": "a"}, [], "DSSS", 0.5, **planned)])
    _, text = printed(tmp_path)
    assert [word for word in text.split() if word in ("53.2", "4,000", "524,288")] == ["53.2", "4,000", "524,288"]
    (row,) = csv.DictReader((tmp_path / "sweep.csv").open())
    assert {name: float(row[name]) for name in planned} == planned


def test_jobs_planned_beside_measured_ones_show_what_is_planned_too(tmp_path: Path) -> None:
    planned = Job(tmp_path / "b", "layout=b", {}, [], "D", 1.0, status=Status.PLANNED, predicted_step_time_s=4.0)
    write_record(tmp_path, [made(tmp_path, "a", 1), planned])
    text = printed(tmp_path)[1]
    measured, _, plans = text.partition("predicted ms/step")
    assert ("500" in measured, "layout=a" in measured, "layout=b" in measured) == (True, True, False)
    assert ("4,000" in plans, "layout=a" in plans, "layout=b" in plans) == (True, False, True)


@pytest.mark.parametrize(("batches", "noted"), [((8, 8), False), ((8, 16), True)])
def test_held_out_losses_over_different_tokens_are_noted(tmp_path: Path, batches: tuple[int, int], noted: bool) -> None:
    jobs = [made(tmp_path, "a", seed) for seed in (1, 2)]
    for job, size in zip(jobs, batches, strict=True):
        content = {"evaluation": {"batches": 2}, "train": {"global_batch_size": size, "seq_length": 128}}
        (job.folder / "config.yaml").write_text(json.dumps(content))
    write_record(tmp_path, jobs)
    assert ("held-out losses are over 2,048 to 4,096 tokens" in printed(tmp_path)[1]) == noted


def test_the_best_job_is_chosen_by_the_loss_that_a_sweeper_gets(tmp_path: Path) -> None:
    better = made(tmp_path, "b", 1, loss=1.5)
    jobs = [made(tmp_path, "a", 1), better, made(tmp_path, "c", 2, loss=1.4)]
    earlier = replace(made(tmp_path, "d", 1, loss=1.0), is_earlier=True)
    write_record(tmp_path, [earlier, *jobs])
    assert f"best of 3: layout=b seed=1 | held out 2.5000 | {better.folder}\n" in printed(tmp_path)[1]
    write_record(tmp_path, [earlier, better])
    assert "best of" not in printed(tmp_path)[1]


def test_ticks_of_close_losses_are_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: [save(self, *args, **kwargs), drawn.append(self)]
    )
    write_record(tmp_path, [made(tmp_path, name, 3, loss=2 + tiny) for name, tiny in (("a", 1e-5), ("b", 2e-5))])
    printed(tmp_path)
    loss, _ = drawn[0].axes
    assert loss.get_title(loc="left") == "Held-out loss (nats per token)"
    labels = [label.get_text() for label in loss.get_yticklabels()]
    assert all(text.startswith("5.000") for text in labels), labels
    assert {axis.get_offset_text().get_text() for axis in (loss.xaxis, loss.yaxis)} == {""}


def test_jobs_of_two_sweeps_are_labelled_by_all_differences(tmp_path: Path) -> None:
    first = Job(tmp_path / "a", "seed=1", {"seed": "1"}, ["+model=m", "seed=1", "run_dir='a'"])
    second = Job(tmp_path / "b", "seed=1", {"seed": "1"}, ["+model=m", "seed=1", "layout.layers=S", "run_dir='b'"])
    assert [job.label for job in relabel([first, second])] == ["seed=1", "seed=1 layout.layers=S"]
    assert relabel([first, second])[1].swept == {"seed": "1", "layout.layers": "S"}


def test_an_earlier_sweeps_failure_is_shown_but_does_not_fail_this_one(tmp_path: Path) -> None:
    failed = Job(tmp_path / "c", "layout=c", {}, [], status=Status.FAILED, error="no data", is_earlier=True)
    write_record(tmp_path, [failed, made(tmp_path, "a", 1)])
    good, text = printed(tmp_path)
    assert good
    assert "no data" in text


def test_a_failed_job_shows_its_error_beside_the_results_of_the_others(tmp_path: Path) -> None:
    swept = {"layout": "[c]", "seed": "1"}
    failed = Job(tmp_path / "c", "layout=[c] seed=1", swept, [], status=Status.FAILED, error="no [red]data")
    write_record(tmp_path, [made(tmp_path, "a", 1), failed])
    good, text = printed(tmp_path)
    assert not good
    assert "failed layout=[c] seed=1: no [red]data" in text
    assert "layout=a seed=1" in text


def test_a_diverged_run_and_more_runs_than_colours_are_drawn(tmp_path: Path) -> None:
    jobs = [made(tmp_path, f"l{number}", 1) for number in range(60)]
    metrics = jobs[0].folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("3.0", "null").replace("2.05", "null"))
    write_record(tmp_path, jobs)
    assert printed(tmp_path)[0]
    assert (tmp_path / "sweep.png").is_file()


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("setting up\nerror: seed=-1: is out of range\nTraceback\nChildFailedError: x\n", "seed=-1: is out of range"),
        (
            "[rank0]: Traceback\n[rank0]: torch.OutOfMemoryError: CUDA out of memory\n"
            "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n",
            "torch.OutOfMemoryError: CUDA out of memory",
        ),
        ("[rank0]: [rank0]: ValueError: by torch and torchrun\n", "ValueError: by torch and torchrun"),
        ("Segmentation fault\n\n", "Segmentation fault"),
        ("", "it wrote nothing"),
    ],
)
def test_the_cause_of_a_failure_is_found_in_the_log(tmp_path: Path, log: str, cause: str) -> None:
    (tmp_path / "log.txt").write_text(log)
    assert last_error(tmp_path / "log.txt") == cause


def test_a_job_without_a_log_wrote_nothing(tmp_path: Path) -> None:
    assert last_error(tmp_path / "log.txt") == "it wrote nothing"


def write_rank(folder: Path, rank: str, text: str, second: int) -> None:
    """Write a rank's log, last modified at `second`: `HOST/START/attempt_N/RANK`."""
    path = folder / "logs" / rank / "stderr.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (second, second))


def begin_attempt(folder: Path, attempt: str, second: int) -> None:
    os.utime(folder / "logs" / attempt, (second, second))


def test_an_error_missing_in_the_log_is_found_in_the_log_of_the_rank_that_ended_first(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("step 1\nsrun: error: node2: task 1: Exited with exit code 1\n")
    write_rank(tmp_path, "node1/9_a/attempt_0/0", "RuntimeError: connection reset by peer\n", 30)
    write_rank(tmp_path, "node2/9_b/attempt_0/1", "[rank3]: torch.OutOfMemoryError: CUDA out of memory\n", 20)
    for attempt, second in (("node1/9_a/attempt_0", 10), ("node2/9_b/attempt_0", 11)):
        begin_attempt(tmp_path, attempt, second)
    assert last_error(tmp_path / "log.txt") == "torch.OutOfMemoryError: CUDA out of memory"


def test_errors_of_earlier_attempts_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("step 1\nsrun: error: node2: task 1: Exited with exit code 1\n")
    write_rank(tmp_path, "node1/9_a/attempt_0/1", "ValueError: of another start\n", 20)
    write_rank(tmp_path, "node2/9_b/attempt_0/1", "ValueError: before the restart\n", 40)
    write_rank(tmp_path, "node2/9_b/attempt_1/1", "ValueError: the last\n", 60)
    for attempt, second in (("node1/9_a/attempt_0", 10), ("node2/9_b/attempt_0", 30), ("node2/9_b/attempt_1", 50)):
        begin_attempt(tmp_path, attempt, second)
    assert last_error(tmp_path / "log.txt") == "ValueError: the last"


def test_an_error_in_the_log_precedes_errors_of_ranks(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("[rank0]: error: the disk is full\n")
    write_rank(tmp_path, "node1/9_a/attempt_0/1", "RuntimeError: connection reset by peer\n", 20)
    begin_attempt(tmp_path, "node1/9_a/attempt_0", 10)
    assert last_error(tmp_path / "log.txt") == "the disk is full"


def test_without_any_error_the_last_line_of_the_log_is_the_cause(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("step 1\nslurmstepd: error: CANCELLED\n")
    write_rank(tmp_path, "node1/9_a/attempt_0/1", "warning: slow\n", 20)
    begin_attempt(tmp_path, "node1/9_a/attempt_0", 10)
    assert last_error(tmp_path / "log.txt") == "slurmstepd: error: CANCELLED"
