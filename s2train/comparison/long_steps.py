"""Step time of layers of a model at long sequences, hybrids beside dense models, each with the best stack it can have.

Random tokens, the whole step with gradients' norm and optimizer, nothing saved. The same number of layers at a length
for every way of attending, as many as the plan says fit. One process measures one way after another; it is replaced
when one fails.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from s2train.comparison.stacks import Way
from s2train.costs.memory import GIB
from s2train.environment.hardware import Hardware, detect_own
from s2train.errors import ConfigError
from s2train.files import replacing
from s2train.kernels.workers import run_tasks, serve
from s2train.layouts.hybrid import parse_layers
from s2train.planning import Plan, check, compose_run, preview

_SECONDS = 600.0  # for one way at one length


@dataclass(frozen=True)
class Row:
    """One way at one length.

    Attributes:
        way: its name; hybrids' begin with "hybrid", dense ones' with "dense".
        step_s: median of the measured steps' seconds; `slowest_s` their maximum.
        flops_per_token: training FLOPs over kept positions, which MFU counts; recomputation is not counted.
        planned_gib, peak_gib: tensors on the device, as the plan foretold and as measured; 0 on a CPU.
        planned_s: the step as the plan foretold; None where it foretells none.
        stack: settings of the way; `kernels` are attention's, as a run says them.
    """

    way: str
    seq_length: int
    layers: int
    recompute: str
    sequences_a_step: int
    steps: int
    step_s: float
    slowest_s: float
    tokens_per_s: float
    flops_per_token: float
    mfu: float | None
    planned_gib: float
    peak_gib: float
    planned_s: float | None = None
    stack: str = ""
    kernels: tuple[str, ...] = ()

    @property
    def is_hybrid(self) -> bool:
        return self.way.startswith("hybrid")


@dataclass(frozen=True)
class Request:
    """What to measure: a size of conf/model, lengths and tokens a step, layers (None: as many as fit)."""

    size: str
    lengths: Sequence[int]
    tokens: int
    layers: int | None
    steps: int
    warmup: int
    overrides: Sequence[str]
    layouts: Sequence[str] = ("DSSS",)


def case_overrides(size: str, way: Way, length: int, tokens: int, layers: int, recompute: str) -> list[str]:
    """Settings of one measurement."""
    return [
        f"+model={size}_{way.variant}",
        "parallel.tp=1",
        "parallel.sequence_parallel=false",
        f"model.num_layers={layers}",
        f"train.seq_length={length}",
        f"train.global_batch_size={max(tokens // length, 1)}",
        "train.micro_batch_size=1",
        f"train.recompute={recompute}",
        *way.settings,
    ]


def fitting(request: Request, ways: Sequence[Way], length: int, hardware: Hardware) -> tuple[int, str]:
    """How many layers fit in every way, and with how much recomputation: none, if the fewest fit so.

    With `request.layers` that many; else whole repetitions of every layout, in groups of four, as many as fit with a
    tenth of the memory to spare (fragments).

    Raises:
        ConfigError: not even so many, or the fewest, fit with full recomputation.
    """
    counts = [request.layers] if request.layers else [n for n in range(32, 0, -4) if _divides(request.layouts, n)]
    for recompute in ("none", "full"):
        for count in counts:
            settings = (case_overrides(request.size, way, length, request.tokens, count, recompute) for way in ways)
            plans = [_plan([*each, *request.overrides], hardware) for each in settings]
            if all(plan.memory.total <= 0.9 * hardware.memory for plan in plans):
                return count, recompute
    raise ConfigError(
        "--lengths",
        length,
        f"{counts[-1]} layers don't fit {hardware.name}",
        "Leave it out, or add model.vocab_size=8192: its logits are smaller",
    )


def _divides(layouts: Sequence[str], layers: int) -> bool:
    try:
        return all(parse_layers(letters, layers) for letters in layouts)
    except ConfigError:
        return False


def _plan(overrides: Sequence[str], hardware: Hardware) -> Plan:
    return preview(compose_run(overrides), 1, hardware)


def measure(task: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A `Row` of the task's `name`, `stack` and `overrides`, by so many `steps` after `warmup`."""
    from s2train.comparison.short_runs import run_steps  # imports Megatron, which the asking process doesn't need

    cfg, hardware = compose_run(task["overrides"]), detect_own()
    plan = check(cfg, 1, hardware)
    found = run_steps(cfg, task["warmup"] + task["steps"], device)
    measured = found.seconds[task["warmup"] :]
    step_s = statistics.median(measured)
    tokens_per_s = cfg.train.global_batch_size * cfg.train.seq_length / step_s
    peak = hardware.peak_flops(cfg.train.precision)
    row = Row(
        way=task["name"],
        seq_length=cfg.train.seq_length,
        layers=cfg.model.num_layers,
        recompute=cfg.train.recompute,
        sequences_a_step=cfg.train.global_batch_size,
        steps=len(measured),
        step_s=step_s,
        slowest_s=max(measured),
        tokens_per_s=tokens_per_s,
        flops_per_token=plan.flops.sparse,
        mfu=tokens_per_s * plan.flops.sparse / peak if peak else None,
        planned_gib=(plan.memory.total - plan.memory.overhead) / GIB if device.type == "cuda" else 0.0,
        peak_gib=found.peak_bytes / GIB,
        planned_s=plan.prediction.time.total if plan.prediction else None,
        stack=task["stack"],
        kernels=tuple(found.kernels),
    )
    return asdict(row)


def serve_cases() -> None:
    """The measuring process: answers cases from standard input, one after another."""
    from s2train.megatron import setup

    joined: list[torch.device] = []

    def answer(task: dict[str, Any]) -> dict[str, Any]:
        if not joined:
            cfg = compose_run(task["overrides"])
            joined.append(setup.initialize(cfg.parallel, cfg.seed))
            setup.connect(cfg.parallel, joined[0])
        return measure(task, joined[0])

    serve(answer)


def measure_all(
    request: Request, ways: Sequence[Way], output: Path, command: list[str], made_by: dict[str, Any], say: Any
) -> list[Row]:
    """Measure what OUTPUT.json has not yet, writing it after each; a way that fails is left out, and told.

    Args:
        command: Python's arguments for a process that calls `serve_cases`.
        made_by: command, device, versions: what the file begins with.

    Raises:
        ConfigError: too few layers fit at one of the lengths; nothing was measured.
    """
    path = output.with_name(output.name + ".json")
    before = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    rows = [Row(**row) for row in before["rows"]]
    earlier = [*before.get("earlier_commands", []), *([before["command"]] if "command" in before else [])]
    hardware = detect_own()
    # all of them first: what can't fit is told before anything is measured
    fits = [fitting(request, ways, length, hardware) for length in request.lengths]
    tasks: list[dict[str, Any]] = []
    for length, (layers, recompute) in zip(request.lengths, fits, strict=True):
        for way in ways:
            if any((row.way, row.seq_length) == (way.name, length) for row in rows):
                continue
            overrides = case_overrides(request.size, way, length, request.tokens, layers, recompute)
            say(f"{way.name}, {length:,} tokens, {layers} layers, recompute {recompute}")
            task = {"name": way.name, "stack": " ".join(way.settings), "overrides": [*overrides, *request.overrides]}
            tasks.append(task | {"steps": request.steps, "warmup": request.warmup})
    for task, found in zip(tasks, run_tasks(command, tasks, 1, _SECONDS), strict=True):
        if "error" in found:
            say(f"failed: {task['name']}: {found['error']}")
            continue
        rows.append(Row(**found))
        say(f"measured: {rows[-1].way}, {rows[-1].seq_length:,} tokens: {rows[-1].step_s:.3f} s a step")
        with replacing(path) as temporary:
            content = {**made_by, "earlier_commands": earlier, "request": asdict(request)}
            content["rows"] = [asdict(row) for row in rows]
            temporary.write_text(json.dumps(content, indent=1) + "\n")
    return rows
