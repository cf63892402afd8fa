"""Measures steps of very long sequences under context parallelism."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from s2train.command_line.messages import warn
from s2train.environment.hardware import Hardware
from s2train.environment.liger import WITHOUT_TP
from s2train.errors import ConfigError
from s2train.planning import Plan, compose_run, preview
from s2train.scaling.jobs import Job, Outcome, Runner
from s2train.scaling.parity import compare_losses
from s2train.scaling.speed import memory

_STEPS, _WARM = 3, 1
_LONG_S = 20.0  # a step predicted to take longer is measured once
_START_S = 120.0  # of a run, until its first step


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        size: of SIZE_hybrid and SIZE_dense of conf/model.
        lengths: tokens of a sequence; a step takes one.
        agreement: length at which losses are compared with those of two devices.
        layers: number of layers; None: the most that fit, a multiple of four.
        step_s: longest predicted time of a step, for the choice of layers and of the dense model's length.
        settings: of every run.
    """

    size: str
    lengths: Sequence[int]
    agreement: int
    layers: int | None
    step_s: float
    settings: Sequence[str]


def long_steps(runner: Runner, request: Request, hardware: Hardware) -> Iterator[dict[str, Any]]:
    """Measure hybrids at each length, and the dense model at one.

    That is the longest at which a step of the dense model is predicted to be quick enough.

    The dense model has as many layers as the hybrid at that length. Before, losses of a hybrid on all devices are
    compared with those on two, or on one of two. Plans all runs at once, and yields the results after each run.

    Raises:
        ConfigError: no number of layers fits at one of the lengths, a run is predicted to exceed its time limit, or the
            command's settings would change what is compared.
    """
    lengths, cp = sorted(request.lengths), runner.devices
    base = min(2, cp // 2)
    unknown = [Job("", cp, _settings(request, "hybrid", length, cp, None)) for length in lengths]
    compared = _compared(runner, request, base, None)
    runner.check("long", [*unknown, *compared.values()])  # else plans would be rejected
    if len(compared) == 2:
        problem = "without tensor parallelism, which loss=linear excludes, no two runs differ only in rounding"
        raise ConfigError("--gpus", cp, f"{problem} on CPUs", "Set --gpus 4, or leave the loss out")
    layers, plans = {}, {}
    for length in lengths:
        layers[length], plans["hybrid", length] = _most_layers(request, length, cp, hardware)
    if hardware.kind == "cuda" and hardware.rates is None:
        warn(f"rates of {hardware.name} are unknown: no step is predicted, so that --long-seconds limits none")
    for length in reversed(lengths):
        plan = _plan(request, "dense", length, cp, layers[length], hardware)
        if _fits(plan, request.step_s):
            plans["dense", length] = plan
            break
    named = {f"long {model} {length}": (model, length) for model, length in plans}
    jobs, planned = [], []
    for name, (model, length) in named.items():
        plan = plans[model, length]
        steps = _WARM + 1 if (_predicted(plan) or 0.0) > _LONG_S else _STEPS
        planned.append((name, plan, steps))
        settings = _settings(request, model, length, cp, layers[length], steps)
        jobs.append(Job(name, cp, (*settings, "checkpoint.save=false")))
    count, slowest = _most_layers(request, request.agreement, base, hardware)
    compared = _compared(runner, request, base, count)
    runner.check("long", [*jobs, *compared.values()])
    _check_limit([*planned, (f"agreement {request.agreement}", slowest, _STEPS)], runner.timeout_s)

    def results() -> Iterator[dict[str, Any]]:
        agreement: dict[str, Any] = {}
        shape = {"compared_with": f"cp{base}", "seq_length": request.agreement, "layers": count}
        for found in _agreement(runner, compared):
            agreement = found | shape
            yield {"agreement": agreement, "rows": {}}
        rows: dict[str, Any] = {}
        for name, outcome in runner.run_each(jobs):
            model, length = named[name]
            rows[name] = {"model": f"{request.size}_{model}", "seq_length": length, "cp": cp, "layers": layers[length]}
            rows[name] |= _row(outcome, plans[model, length])
            yield {"agreement": agreement, "rows": rows}

    return results()


def _check_limit(runs: Sequence[tuple[str, Plan, int]], timeout_s: float) -> None:
    """Check that each run's predicted time is within the limit.

    Args:
        runs: name, plan and steps of each.
    Raises:
        ConfigError: the longest exceeds it.
    """
    needed, step_s, steps, name = max(
        (steps * (step_s := _predicted(plan) or 0.0) + _START_S, step_s, steps, name) for name, plan, steps in runs
    )
    if needed > timeout_s:
        raise ConfigError(
            "--timeout",
            f"{timeout_s:.0f}",
            f"{name} takes {needed:.0f} s: {steps} steps of predicted {step_s:.0f} s, and {_START_S:.0f} s to start",
            f"Set at least {math.ceil(needed)}, or lower --long-seconds, --long-layers or --long-lengths",
        )


def _compared(runner: Runner, request: Request, base: int, count: int | None) -> dict[str, Job]:
    """Return the runs whose losses are compared, by what they differ in.

    The first is on two devices, or on one of two; the second is context parallel over all. The others are on two
    devices or one, and differ from the first only in rounding.

    Args:
        base: two, or one of two.
        count: number of layers; None if it isn't known yet.
    """
    variants: dict[str, tuple[int, tuple[str, ...]]] = {"one": (base, ()), f"cp{runner.devices}": (runner.devices, ())}
    if base == 2:
        variants |= {f"cp2 {mode}": (2, (f"parallel.cp_exchange={mode}",)) for mode in ("gather", "overlapped")}
    if not any(f"loss={name}" in request.settings for name in WITHOUT_TP):  # which needs the output layer whole
        variants["tp2"] = (2, ("parallel.cp=1", "parallel.tp=2", "parallel.sequence_parallel=true"))
    if torch.cuda.is_available():
        variants[f"cp{base} portable kernels"] = (base, ("attention_backend=portable",))
    return {
        name: Job(
            f"agreement {name}",
            cp,
            (*_settings(request, "hybrid", request.agreement, cp, count), *own, "checkpoint.save=false"),
        )
        for name, (cp, own) in variants.items()
    }


def _agreement(runner: Runner, compared: Mapping[str, Job]) -> Iterator[dict[str, Any]]:
    """Compare losses of context parallelism over all devices and over two.

    Of two devices, with one. Yields the comparison after each run.

    The tolerance is twice the largest difference between runs on two devices or one that differ only in rounding.
    """
    one, all_devices, *rounding = compared
    outcomes: dict[str, Outcome] = {}
    names = {job.name: name for name, job in compared.items()}
    for name, outcome in runner.run_each(list(compared.values())):
        outcomes[names[name]] = outcome
        found = compare_losses(outcomes, rounding, [all_devices] if all_devices in outcomes else [])
        found["agrees"] = found["agrees"] and all_devices in outcomes
        yield found | {"settings": compared[one].settings}


def _settings(
    request: Request, model: str, length: int, cp: int, layers: int | None, steps: int = _STEPS
) -> tuple[str, ...]:
    return (
        f"+model={request.size}_{model}", *([] if layers is None else [f"model.num_layers={layers}"]),
        "data=mock", f"train.seq_length={length}",
        "train.global_batch_size=1", "train.micro_batch_size=1", f"train.steps={steps}", "train.recompute=full",
        "parallel.tp=1", "parallel.sequence_parallel=false", f"parallel.cp={cp}", "optim.warmup_steps=1",
        "evaluation.interval=0", "tracking.log_interval=1", "checkpoint.resume=never",
    )  # fmt: skip


def _plan(request: Request, model: str, length: int, cp: int, layers: int, hardware: Hardware) -> Plan:
    """Plan a run.

    Raises:
        ConfigError: a setting can't work; the length's error names its option.
    """
    cfg = compose_run([*_settings(request, model, length, cp, layers), *request.settings])
    try:
        return preview(cfg, cp, hardware)
    except ConfigError as error:
        if error.setting != "train.seq_length":
            raise
        option = _option(request, length)
        raise ConfigError(option, length, error.problem, error.remedy.replace(error.setting, option)) from error


def _fits(plan: Plan, step_s: float) -> bool:
    return plan.fits_with_room and (_predicted(plan) or 0.0) <= step_s


def _predicted(plan: Plan) -> float | None:
    """Return a step's predicted seconds; None on a device of unknown rates."""
    return None if plan.prediction is None else plan.prediction.time.total


def _option(request: Request, length: int) -> str:
    """Return the option that a length is of."""
    return "--long-lengths" if length in request.lengths else "--long-agreement"


def _most_layers(request: Request, length: int, cp: int, hardware: Hardware) -> tuple[int, Plan]:
    """Return the hybrid's number of layers at a length, and its plan.

    Raises:
        ConfigError: none fits, or those asked for don't.
    """
    option = _option(request, length)
    if request.layers is not None:
        plan = _plan(request, "hybrid", length, cp, request.layers, hardware)
        if not plan.fits:
            remedy = f"Set fewer, or a smaller {option}"
            raise ConfigError("--long-layers", request.layers, f"at {length} tokens {_shortage(plan, 1.0)}", remedy)
        return request.layers, plan
    most: int = compose_run([f"+model={request.size}_hybrid"]).model.num_layers
    for count in range(most, 0, -4):
        try:
            plan = _plan(request, "hybrid", length, cp, count, hardware)
        except ConfigError as error:
            if error.setting != "layout.layers" or count == most:  # whose letters may stand for more than four layers
                raise
            continue
        if _fits(plan, request.step_s):
            return count, plan
    layers = f"{plan.cfg.model.num_layers} layers on {cp} devices"  # the fewest
    if not plan.fits_with_room:
        problem, remedy = _shortage(plan, 0.9), _with_room(request, plan, length, cp, hardware)
    else:
        problem = f"take {_predicted(plan):.0f} s a step, more than {request.step_s:.0f}"
        remedy = "or raise --long-seconds"
    smaller = "Leave it out" if option == "--long-lengths" else "Set a smaller one"
    raise ConfigError(option, length, f"{layers} {problem}", f"{smaller}, {remedy}")


def _with_room(request: Request, plan: Plan, length: int, cp: int, hardware: Hardware) -> str:
    """Propose smaller logits if a plan then fits, else a smaller model."""
    for smaller in (["loss=linear"], ["model.vocab_size=8192"], ["loss=linear", "model.vocab_size=8192"]):
        changed = replace(request, settings=[*request.settings, *smaller])
        if _plan(changed, "hybrid", length, cp, plan.cfg.model.num_layers, hardware).fits_with_room:
            return f"or add {' '.join(smaller)} for smaller logits"
    return "or set a smaller --long-size"


def _shortage(plan: Plan, share: float) -> str:
    """Say what memory a plan needs, and how much there is."""
    needed, there = plan.memory.total / 2**30, share * plan.hardware.memory / 2**30
    return f"need {needed:.1f} GiB each, of {there:.1f}"


def _row(outcome: Outcome, plan: Plan) -> dict[str, Any]:
    """Summarize a run by medians over its steps after the first."""
    predicted = _predicted(plan)
    if outcome.error is not None:
        return {"error": outcome.error, "predicted_s": predicted}
    steps = [record for record in outcome.records if "tokens_per_s" in record]
    measured = [record for record in steps if record["step"] > _WARM]
    return {
        "step_time_s": statistics.median(record["step_time_s"] for record in measured),
        "measured_steps": len(measured),
        "predicted_s": predicted,
        "tokens_per_s": statistics.median(record["tokens_per_s"] for record in measured),
        "mfu": statistics.median(record["mfu"] for record in measured) if "mfu" in measured[0] else None,
        **memory(outcome),
        "losses": [record["loss"] for record in steps],
        "is_finite": all(record["loss"] is not None and math.isfinite(record["loss"]) for record in steps),
    }
