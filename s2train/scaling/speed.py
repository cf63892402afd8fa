"""Measures tokens per second by parallelism and number of GPUs."""

import statistics
from typing import Any

from s2train.scaling.jobs import Job, Outcome, Runner
from s2train.training.profile_table import COMMUNICATION, HIDDEN

_STEPS, _WARM = 9, 3  # the last one is profiled
GOALS = {"dp": 0.95, "cp": 0.85, "tp": 0.80}  # share of linear scaling on two GPUs


def speed(runner: Runner, models: tuple[str, ...], seq_length: int, sequences: int) -> dict[str, Any]:
    """Measure each model on 1, 2, 4, … devices with each parallelism.

    A data parallel run takes `sequences` sequences per step on every device, the others take that number in total.
    """
    jobs = [_job(model, "one", 1, seq_length, sequences) for model in models]
    size = 2
    while size <= runner.devices:
        jobs += [_job(model, mode, size, seq_length, sequences) for model in models for mode in GOALS]
        size *= 2
    outcomes = runner.run(jobs)
    rows: dict[str, Any] = {}
    for model in models:
        alone = summary(outcomes[f"{model} one"], 1, None)
        rows[model] = {"one": alone} | {
            name.removeprefix(f"{model} "): summary(outcomes[name], processes, alone.get("tokens_per_s"))
            for name, processes in ((job.name, job.processes) for job in jobs)
            if name.startswith(f"{model} ") and processes > 1
        }
    return {"seq_length": seq_length, "sequences": sequences, "goals": GOALS, "models": rows}


def summary(outcome: Outcome, processes: int, alone: float | None) -> dict[str, Any]:
    """Summarize a run by medians over its steady steps.

    `efficiency` is tokens per second over `processes` times those of one device. Communication and parts are those of
    rank 0's profiled step; communication includes waiting for other ranks.
    """
    if outcome.error is not None:
        return {"error": outcome.error}
    steps = [record for record in outcome.records if "tokens_per_s" in record and record["step"] > _WARM]
    (profile,) = [record for record in outcome.records if record.get("event") == "profile"]
    steady = [
        record for record in steps if record["step"] < profile["traced"][0] - 1
    ]  # without the step before the traced ones, which warms up the profiler
    exposed, hidden = (profile["parts"].get(part, 0.0) / profile["step_ms"] for part in (COMMUNICATION, HIDDEN))
    tokens_per_s = statistics.median(record["tokens_per_s"] for record in steady)
    return {
        "tokens_per_s": tokens_per_s,
        "efficiency": None if alone is None else tokens_per_s / (processes * alone),
        "mfu": statistics.median(record["mfu"] for record in steady) if "mfu" in steady[0] else None,
        "step_time_s": statistics.median(record["step_time_s"] for record in steady),
        "communication": exposed + hidden,
        "communication_exposed": exposed,
        "profiled_step_s": profile["step_ms"] / 1e3,
        "parts_ms": profile["parts"],
        "memory_gib": max(record["memory_gib"] for record in steps),
        "loss": steps[-1]["loss"],
    }


def _job(model: str, mode: str, size: int, seq_length: int, sequences: int) -> Job:
    modes = {
        "one": (),
        "dp": (),
        "cp": (f"parallel.cp={size}",),
        "tp": (f"parallel.tp={size}", "parallel.sequence_parallel=true"),
    }
    batch = sequences * (size if mode == "dp" else 1)
    settings = (
        f"+model={model}", "data=mock", f"train.seq_length={seq_length}", f"train.steps={_STEPS}",
        f"train.global_batch_size={batch}", "train.micro_batch_size=1", "optim.warmup_steps=2",
        "evaluation.interval=0", "tracking.log_interval=1", f"profile.steps=[{_STEPS},{_STEPS}]",
        "checkpoint.save=false", "checkpoint.resume=never", *modes[mode],
    )  # fmt: skip
    return Job(f"{model} one" if mode == "one" else f"{model} {mode}{size}", size, settings)
