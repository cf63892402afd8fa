"""Compares finished runs: a table, a picture, and their environment."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from s2train.environment.provenance import environment
from s2train.errors import ConfigError, as_typed
from s2train.files import output_stem, write_json
from s2train.training.records import last_evaluation, read_curves, read_records

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS = ("held out", "first 1/8", "last 1/2")  # table headings for HELD_OUT
HELD_OUT = ("held_out_loss", "held_out_short", "held_out_long")


@dataclass(frozen=True)
class Summary:
    """Summary of one run.

    Attributes:
        steps: steps done at the last report.
        loss, held_out_loss: last reported values, nats per token; None if there is none or it was not finite.
        held_out_short, held_out_long: held-out loss over the first eighth and the last half of the positions.
        tokens_per_s, model_tflops, mfu, step_time_s: medians over the reports after the first tenth of the run, without
            the first one of each start: its time contains compilation. Over these too if there are no others.
        peak_memory_gib: peak memory allocated on rank 0's device; 0 on a CPU.
        is_evaluated: whether a held-out loss was reported, finite or not.
        held_out_tokens: tokens of an evaluation; None if the folder has no settings.
        held_out_seed: that orders the held-out samples: `evaluation.seed`, or the run's if that is null; None if the
            folder has no settings.
        held_out_data: settings that name the text of held-out losses and its tokenizer; None if the folder has none.
        times_a_start: whether times and rates are of first reports of starts.
    """

    name: str
    steps: int
    tokens: int
    loss: float | None
    held_out_loss: float | None
    held_out_short: float | None
    held_out_long: float | None
    step_time_s: float
    tokens_per_s: float
    model_tflops: float
    mfu: float | None
    peak_memory_gib: float
    is_evaluated: bool = False
    held_out_tokens: int | None = None
    held_out_seed: int | None = None
    held_out_data: str | None = None
    times_a_start: bool = False

    @property
    def ranking_loss(self) -> tuple[str, float | None]:
        """Name and value of the loss that ranks runs.

        Held out, or else the last training loss of a run without evaluations. A held-out loss that is not finite is
        None: a training loss, of the steps that were not skipped, would pass for a good one.
        """
        if self.is_evaluated or self.held_out_loss is not None:
            return "held out", self.held_out_loss
        return "loss", self.loss

    def losses(self) -> list[str]:
        """Format the loss and the losses of `HEADINGS`.

        For a table; empty if there is none.
        """
        values = (self.loss, self.held_out_loss, self.held_out_short, self.held_out_long)
        return ["" if value is None else f"{value:.4f}" for value in values]


def summarize(run_dir: Path) -> Summary:
    """Summarize a run folder's metrics; steps repeated after a resume count once.

    Raises:
        ConfigError: the run has reported nothing.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError("runs", run_dir, "has no metrics.jsonl", "Set folders of runs")
    records = read_records(path)
    reports = [record for record in records if "tokens_per_s" in record]
    if not reports:
        raise ConfigError("runs", run_dir, "has reported no step yet", "Leave it out, or train it first")
    last = reports[-1]["step"]
    late = [report for report in reports if report["step"] > last / 10]
    first = _first_reports(records)
    steady = [report for report in late if report["step"] not in first]
    times_a_start = not steady
    steady = steady or late
    evaluation = last_evaluation(records)

    def median(name: str) -> float:
        return statistics.median(report[name] for report in steady)

    return Summary(
        name=run_dir.name,
        steps=last,
        # older runs don't record consumed tokens
        tokens=reports[-1].get("consumed_tokens", read_curves(path).tokens(last)),
        loss=reports[-1]["loss"],
        **{name: (evaluation or {}).get(name) for name in HELD_OUT},
        step_time_s=median("step_time_s"),
        tokens_per_s=median("tokens_per_s"),
        model_tflops=median("model_tflops"),
        mfu=None if any("mfu" not in report for report in steady) else median("mfu"),
        peak_memory_gib=max(report["memory_gib"] for report in reports),
        is_evaluated=evaluation is not None,
        **_held_out_settings(run_dir / "config.yaml"),
        times_a_start=times_a_start,
    )


def _first_reports(records: Sequence[dict[str, Any]]) -> set[int]:
    """Return the steps of each start's first report."""
    steps, is_first = set(), True
    for record in records:
        if record.get("event") == "config":
            is_first = True
        elif is_first and "tokens_per_s" in record:
            steps.add(record["step"])
            is_first = False
    return steps


def _held_out_settings(config: Path) -> dict[str, Any]:
    """Read what a run's held-out losses are of, as fields of `Summary`."""
    if not config.is_file():
        return {}
    cfg = OmegaConf.load(config)

    def values(*names: str) -> list[Any]:
        found = (OmegaConf.select(cfg, name) for name in names)
        return [OmegaConf.to_container(value) if OmegaConf.is_list(value) else value for value in found]

    counts = values("evaluation.batches", "train.global_batch_size", "train.seq_length")
    own = ["data.valid_path"] if values("data.valid_path") != [None] else ["data.path", "data.split"]
    data = dict(zip(names := [*own, "data.tokenizer"], values(*names), strict=True))
    return {
        "held_out_tokens": None if None in counts else math.prod(counts),
        "held_out_seed": next((seed for seed in values("evaluation.seed", "seed") if seed is not None), None),
        "held_out_data": " ".join(f"{name}={as_typed(value)}" for name, value in data.items() if value is not None),
    }


def notes(summaries: Iterable[Summary]) -> str | None:
    """Say which of the runs' numbers are not comparable; None: all are."""
    runs = list(summaries)
    found = [note for note in (_held_out_note(runs), _start_note(runs)) if note is not None]
    return "\n".join(found) or None


def _start_note(summaries: Sequence[Summary]) -> str | None:
    count = sum(summary.times_a_start for summary in summaries)
    if not count:
        return None
    whose = "the run" if len(summaries) == 1 else f"{count} of {len(summaries)} runs"
    return f"times and rates of {whose} include a start (compilation), as no later report was made"


def _held_out_note(summaries: Iterable[Summary]) -> str | None:
    """Warn of held-out losses over different texts or tokens.

    Equal weights can differ by more than the runs do: by 0.017 nats over 2,048 and 8,192 tokens of a tiny model, and by
    0.07 over the 8,192 tokens of four seeds.
    """
    evaluated = [s for s in summaries if s.is_evaluated]
    texts = sorted({s.held_out_data for s in evaluated if s.held_out_data is not None})
    if len(texts) > 1:
        several = "; ".join(texts[:2]) + ("; …" if len(texts) > 2 else "")
        return (
            "held-out losses are of several datasets or tokenizers, and not comparable unless these hold the same:"
            f" {several}"
        )
    counts = {s.held_out_tokens for s in evaluated if s.held_out_tokens is not None}
    if len(counts) > 1:
        return (
            f"held-out losses are over {min(counts):,} to {max(counts):,} tokens, and not comparable:"
            " evaluation.batches counts global batches"
        )
    if len({s.held_out_seed for s in evaluated if s.held_out_seed is not None}) > 1:
        return (
            "held-out losses of several values of evaluation.seed (where null, the run's seed) are over different"
            " samples, unless evaluation.batches takes all: compare runs of one value"
        )
    return None


def compare(run_dirs: Sequence[Path], output: Path, command: str) -> "Table":
    """Compare finished runs in OUTPUT.json and OUTPUT.png.

    Args:
        output: with or without suffix.
    Returns:
        The table to print.
    Raises:
        ConfigError: a run has reported nothing, two runs share a name, OUTPUT is a run's folder, a file of it exists,
            or none can be written.
    """
    # slow imports that a sweep, which uses only `summarize`, doesn't need
    from matplotlib.ticker import EngFormatter
    from rich.table import Table

    from s2train.training.plots import draw_comparison

    if (output / "metrics.jsonl").is_file():
        remedy = "Name the comparison first, such as runs/dense-and-hybrid, and then the runs"
        raise ConfigError("output", output, "is the folder of a run", remedy)
    count = EngFormatter(places=1, sep="")  # 41.0k, 1.6M, as on axes
    stem = output_stem(output)
    table_path, picture_path = (stem.with_name(stem.name + suffix) for suffix in (".json", ".png"))
    for path in (table_path, picture_path):
        if path.exists():
            raise ConfigError("output", output, f"{path} exists", "Set another, or move the file away")
    summaries = [summarize(run_dir) for run_dir in run_dirs]
    runs = {summary.name: run_dir / "metrics.jsonl" for summary, run_dir in zip(summaries, run_dirs, strict=True)}
    if len(runs) < len(summaries):
        raise ConfigError("runs", [str(r) for r in run_dirs], "two run folders share a name", "Rename one")
    draw_comparison(runs, picture_path)
    content = {"command": command, **environment(), "runs": [asdict(summary) for summary in summaries]}
    write_json(table_path, content)
    table = Table("run", "steps", "tokens", "loss", *HEADINGS, "ms/step", "tokens/s", "TFLOP/s", "MFU", "peak GiB")
    for s in summaries:
        table.add_row(
            s.name,
            str(s.steps),
            count(s.tokens),
            *s.losses(),
            f"{s.step_time_s * 1e3:.0f}",
            f"{s.tokens_per_s:,.0f}",
            f"{s.model_tflops:.3g}",
            "" if s.mfu is None else f"{s.mfu:.1%}",
            f"{s.peak_memory_gib:.1f}" if s.peak_memory_gib else "",
        )
    table.caption = notes(summaries)
    return table
