"""Measures tokens per second by parallelism and number of GPUs."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from s2train.scaling.jobs import Job, Outcome, Runner
from s2train.training.profile_table import COMMUNICATION, HIDDEN

_STEPS, _WARM = 9, 3  # the last one is profiled

# Divisions by number of devices, with the share of linear scaling to reach; None: no goal was set.
_SP = "parallel.sequence_parallel=true"
DIVISIONS: dict[int, dict[str, tuple[tuple[str, ...], float | None]]] = {
    2: {
        "dp2": ((), 0.95),
        "cp2": (("parallel.cp=2",), 0.85),
        "tp2": (("parallel.tp=2", _SP), 0.80),
    },
    4: {
        "dp4": ((), 0.97),
        "cp4": (("parallel.cp=4",), 0.85),
        "tp4": (("parallel.tp=4", _SP), 0.78),
    },
    8: {
        "dp8": ((), 0.96),
        "cp8": (("parallel.cp=8",), 0.80),
        "tp8": (("parallel.tp=8", _SP), None),
        "tp4 cp2": (("parallel.tp=4", _SP, "parallel.cp=2"), None),
        "tp4 dp2": (("parallel.tp=4", _SP), 0.85),
    },
}


ALONE = "one"  # the division of a single device, which efficiencies refer to


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        models: of conf/model.
        seq_length: tokens of a sequence.
        sequences: of a step, for each data parallel rank.
        micro_batch: sequences that go through a device at once.
        divisions: names in `DIVISIONS`, and `ALONE`; None: all that the devices allow.
    """

    models: tuple[str, ...]
    seq_length: int
    sequences: int
    micro_batch: int = 1
    divisions: tuple[str, ...] | None = None


def known_divisions(devices: int) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Return devices and settings of each division of up to `devices` devices."""
    found: dict[str, tuple[int, tuple[str, ...]]] = {ALONE: (1, ())}
    for size, named in DIVISIONS.items():
        if size <= devices:
            found |= {name: (size, settings) for name, (settings, _) in named.items()}
    return found


def speed(runner: Runner, request: Request) -> Iterator[dict[str, Any]]:
    """Measure each model with each division on 1, 2, 4, … devices.

    Plans all runs at once, and yields the results after each run.

    Raises:
        ConfigError: the command's settings would change what is measured.
    """
    models = request.models
    named = {job.name: (model, division, job) for model in models for division, job in _jobs(runner, model, request)}
    jobs = [job for _, _, job in named.values()]
    runner.check("scaling", jobs)
    shape = {"seq_length": request.seq_length, "sequences": request.sequences, "micro_batch": request.micro_batch}

    def results() -> Iterator[dict[str, Any]]:
        outcomes: dict[str, Outcome] = {}
        for name, outcome in runner.run_each(jobs):
            outcomes[name] = outcome
            rows: dict[str, Any] = {model: {} for model in models}
            for known, (model, division, job) in named.items():
                if known in outcomes:
                    alone = rows[model].get(ALONE, {}).get("tokens_per_s")
                    rows[model][division] = summary(outcomes[known], job.processes, alone) | {"goal": _goal(division)}
            yield {**shape, "models": rows}

    return results()


def summary(outcome: Outcome, processes: int, alone: float | None) -> dict[str, Any]:
    """Summarize a run by medians over its steady steps.

    `efficiency` is tokens per second over `processes` times those of one device. Communication and parts are those of
    rank 0's profiled step: exposed communication includes waiting for other ranks, and hidden is beside computation.
    Memory is that of tensors on the fullest rank, measured and planned; None on a CPU.
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
        "communication_exposed": exposed,
        "communication_hidden": hidden,
        "profiled_step_s": profile["step_ms"] / 1e3,
        "parts_ms": profile["parts"],
        **memory(outcome),
        "loss": steps[-1]["loss"],
    }


def memory(outcome: Outcome) -> dict[str, float | None]:
    """Return measured and planned GiB on the fullest rank.

    None on a CPU.
    """
    found = [record for record in outcome.records if record.get("event") == "memory"]
    if not found:
        return {"memory_gib": None, "planned_gib": None}
    return {"memory_gib": found[-1]["peak_gib"], "planned_gib": found[-1]["planned_gib"]}


def _goal(division: str) -> float | None:
    return next((named[division][1] for named in DIVISIONS.values() if division in named), None)


def _jobs(runner: Runner, model: str, request: Request) -> Iterator[tuple[str, Job]]:
    """Yield each division's name and job."""
    for name, (size, settings) in known_divisions(runner.devices).items():
        if request.divisions is not None and name not in request.divisions:
            continue
        copies = int(name.rpartition("dp")[2]) if "dp" in name else 1
        common = (
            f"+model={model}", "data=mock", f"train.seq_length={request.seq_length}", f"train.steps={_STEPS}",
            f"train.global_batch_size={request.sequences * copies}", f"train.micro_batch_size={request.micro_batch}",
            "optim.warmup_steps=2", "evaluation.interval=0", "tracking.log_interval=1",
            f"profile.steps=[{_STEPS},{_STEPS}]", "checkpoint.save=false", "checkpoint.resume=never",
        )  # fmt: skip
        yield name, Job(f"{model} {name}", size, (*common, *settings))
