"""Finished runs side by side: a table, a picture, and what they ran on."""

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from s2train.errors import ConfigError
from s2train.files import replacing
from s2train.training.plots import draw_comparison, read_curves

_PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "apex")


@dataclass(frozen=True)
class Summary:
    """What one run came to.

    Attributes:
        loss, held_out_loss: at the last step, nats per token.
        tokens_per_s, model_tflops, mfu, step_time_s: medians over the reports after the first tenth of the run.
        peak_memory_gib: most allocated on rank 0's device.
    """

    name: str
    steps: int
    tokens: int
    loss: float
    held_out_loss: float | None
    step_time_s: float
    tokens_per_s: float
    model_tflops: float
    mfu: float | None
    peak_memory_gib: float


def summarize(run_dir: Path) -> Summary:
    """Read a run folder's metrics.

    Raises:
        ConfigError: the run has reported nothing.
    """
    curves = read_curves(run_dir / "metrics.jsonl")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    reports = [record for record in map(json.loads, lines) if "tokens_per_s" in record]
    steady = [r for r in reports if r["step"] > reports[-1]["step"] / 10] or reports
    last = max(curves.train)

    def median(name: str) -> float:
        return statistics.median(report[name] for report in steady)

    return Summary(
        name=run_dir.name,
        steps=last,
        tokens=last * (curves.tokens_per_step or 0),
        loss=curves.train[last],
        held_out_loss=curves.held_out[max(curves.held_out)] if curves.held_out else None,
        step_time_s=median("step_time_s"),
        tokens_per_s=median("tokens_per_s"),
        model_tflops=median("model_tflops"),
        mfu=None if any("mfu" not in report for report in steady) else median("mfu"),
        peak_memory_gib=max(report["memory_gib"] for report in reports),
    )


def environment() -> dict[str, Any]:
    """Date, device and versions."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    return {"date": date.today().isoformat(), "device": device, "python": platform.python_version(), **versions}


def compare(run_dirs: Sequence[Path], output: Path, command: str) -> Table:
    """Write OUTPUT.json and OUTPUT.png from finished runs; returns the table to print.

    Raises:
        ConfigError: a run has reported nothing, or two have one name.
    """
    summaries = [summarize(run_dir) for run_dir in run_dirs]
    runs = {summary.name: run_dir / "metrics.jsonl" for summary, run_dir in zip(summaries, run_dirs, strict=True)}
    if len(runs) < len(summaries):
        raise ConfigError("runs", [str(r) for r in run_dirs], "two run folders share a name", "Rename one")
    draw_comparison(runs, output.with_suffix(".png"))
    content = {"command": command, **environment(), "runs": [asdict(summary) for summary in summaries]}
    with replacing(output.with_suffix(".json")) as path:
        path.write_text(json.dumps(content, indent=1) + "\n")
    table = Table("run", "steps", "tokens", "loss", "held out", "ms/step", "tokens/s", "TFLOP/s", "MFU", "peak GiB")
    for s in summaries:
        table.add_row(
            s.name,
            str(s.steps),
            f"{s.tokens / 1e6:.1f}M",
            f"{s.loss:.4f}",
            "" if s.held_out_loss is None else f"{s.held_out_loss:.4f}",
            f"{s.step_time_s * 1e3:.0f}",
            f"{s.tokens_per_s:,.0f}",
            f"{s.model_tflops:.1f}",
            "" if s.mfu is None else f"{s.mfu:.1%}",
            f"{s.peak_memory_gib:.1f}",
        )
    return table
