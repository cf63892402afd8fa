"""Reports a sweep as a table, sweep.csv and sweep.png."""

import csv
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from s2train.comparison.runs import HEADINGS, Summary, notes
from s2train.files import replacing
from s2train.sweeps.jobs import Job, Status, read_record
from s2train.sweeps.picture import Point, draw

TABLE_WIDTH = 140
# columns of sweep.csv before what was measured
_KNOWN = (
    "status",
    "layers",
    "density",
    "planned_memory_gib",
    "predicted_step_time_s",
    "predicted_tokens_per_s",
    "error",
)


@dataclass(frozen=True)
class Result:
    """A job and the summary of its run.

    The summary is None if the run has reported nothing.
    """

    job: Job
    summary: Summary | None


def report(sweep_dir: Path, console: Console | None = None) -> bool:
    """Print and draw the results.

    Returns whether no job of this sweep failed.
    """
    console = console or Console(width=TABLE_WIDTH)
    results = [Result(job, job.summary()) for job in read_record(sweep_dir)]
    if not results:
        return True
    for table in tables(results):
        console.print(table)
    _write_csv(results, sweep_dir / "sweep.csv")
    written = [sweep_dir / "sweep.csv"]
    if points := [point for result in results if (point := _point(result)) is not None]:
        draw(points, sweep_dir / "sweep.png")
        written.append(sweep_dir / "sweep.png")
    bad = [result.job for result in results if result.job.status in (Status.FAILED, Status.REJECTED)]
    for job in bad:
        console.print(f"{job.status} {job.labelled_error}", style="red", highlight=False, markup=False, soft_wrap=True)
    if (best := _best([result.job for result in results])) is not None:
        console.print(best, highlight=False, markup=False, soft_wrap=True)
    console.print(f"results in {' and '.join(map(str, written))}", highlight=False, markup=False, soft_wrap=True)
    return all(job.is_earlier for job in bad)


def _best(jobs: list[Job]) -> str | None:
    """Describe this sweep's job with the lowest loss.

    Return None if fewer than two jobs have a loss.
    """
    losses = [(loss, job) for job in jobs if not job.is_earlier and (loss := job.loss()) is not None]
    if len(losses) < 2:
        return None
    _, job = min(losses, key=lambda pair: pair[0])
    return f"best of {len(losses)}: {job.label} | {job.loss_text()} | {job.folder}"


def tables(results: list[Result]) -> list[Table]:
    """Build tables with a row per job, in order.

    If a job has reported something, the first shows what was measured, and planned jobs follow in another.
    """
    if all(result.summary is None for result in results):
        return [_planned([result.job for result in results])]
    planned = [result.job for result in results if result.job.status is Status.PLANNED]
    others = [result for result in results if result.summary is not None or result.job.status is not Status.PLANNED]
    return [_measured(others), *([_planned(planned)] if planned else [])]


def _measured(results: list[Result]) -> Table:
    made = Table("job", "status", "layers", "density", "steps", "loss", *HEADINGS, "ms/step", "tokens/s")
    for result in results:
        job, s = result.job, result.summary
        measured = (
            (
                str(s.steps),
                *s.losses(),
                f"{s.step_time_s * 1e3:,.0f}",
                f"{s.tokens_per_s:,.0f}",
            )
            if s is not None
            else ("",) * 7
        )
        made.add_row(*_known(job), *measured)
    made.caption = notes(result.summary for result in results if result.summary is not None)
    return made


def _planned(jobs: list[Job]) -> Table:
    made = Table("job", "status", "layers", "density", "planned GiB", "predicted ms/step", "predicted tokens/s")
    for job in jobs:
        memory, step, speed = job.planned_memory_gib, job.predicted_step_time_s, job.predicted_tokens_per_s
        made.add_row(
            *_known(job),
            "" if memory is None else f"{memory:.1f}",
            "" if step is None else f"{step * 1e3:,.0f}",
            "" if speed is None else f"{speed:,.0f}",
        )
    return made


def _known(job: Job) -> tuple[str, str, str, str]:
    density = "" if job.density is None else f"{job.density:.3f}"
    return job.label, str(job.status), _short(job.layers), density


def _short(layers: str) -> str:
    return layers if len(layers) <= 16 else f"{layers[:8]}… {layers.count('D')}D"


def _write_csv(results: list[Result], path: Path) -> None:
    swept = list(dict.fromkeys(setting for result in results for setting in result.job.swept))
    rows = []
    for job, summary in ((result.job, result.summary) for result in results):
        measured = {} if summary is None else {k: v for k, v in asdict(summary).items() if k != "name"}
        rows.append(
            {"folder": job.folder.name, **job.swept, **{name: getattr(job, name) for name in _KNOWN}, **measured}
        )
    columns = list(dict.fromkeys(["folder", *swept, *(name for row in rows for name in row)]))
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _point(result: Result) -> Point | None:
    """Point of a finished job in the picture.

    Runs that differ only in their seed share a name.
    """
    job, summary = result.job, result.summary
    if summary is None or job.loss() is None or job.density is None:
        return None
    measure, loss = summary.ranking_loss
    assert loss is not None
    name = " ".join(_value(setting, value) for setting, value in job.swept.items() if setting != "seed") or "all"
    return Point(name, job.density, loss, summary.tokens_per_s, measure == "held out")


def _value(setting: str, value: str) -> str:
    """Format a value for the legend.

    A boolean gets its setting.
    """
    return f"{setting.rsplit('.', 1)[-1]}={value}" if value.lower() in ("true", "false") else value
