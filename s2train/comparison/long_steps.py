"""Measures step times of hybrids and dense models at long sequences.

Each model uses its fastest installed kernels. A step includes the gradient norm and the optimizer; tokens are random
and nothing is saved. All variants at a length have the same number of layers, the largest that fits according to the
plan. One process measures the variants in turn, and is replaced if one fails.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from s2train.attention.hybrid import parse_layers
from s2train.comparison.stacks import Stack
from s2train.costs.memory import GIB
from s2train.environment.hardware import Hardware, detect_own
from s2train.errors import ConfigError
from s2train.files import reading, write_json
from s2train.kernels.workers import run_tasks, serve
from s2train.planning import Plan, check, compose_run, hybrid_layout, preview
from s2train.validation.libraries import import_libraries

_SECONDS = 600.0  # time limit for one variant at one length


@dataclass(frozen=True)
class Row:
    """Measurement of one variant at one length.

    Attributes:
        way: name of the variant, which begins with "hybrid" or "dense".
        step_s, slowest_s: median and maximum of the measured steps' seconds.
        flops_per_token: training FLOPs over kept positions, used for MFU, without recomputation.
        planned_gib, peak_gib: planned and measured peak of tensors on the device; 0 on a CPU.
        planned_s: step time predicted by the plan; None if it makes no prediction.
        stack: settings of the variant.
        kernels: attention kernels, as a run logs them.
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
    """What to measure.

    Attributes:
        size: a model size in conf/model.
        lengths: tokens of a sequence.
        tokens: tokens of a step.
        layers: number of layers; None: the largest that fits.
    Raises:
        ConfigError: a number can't work.
    """

    size: str
    lengths: Sequence[int]
    tokens: int
    layers: int | None
    steps: int
    warmup: int
    overrides: Sequence[str]
    layouts: Sequence[str] = ("DSSS",)

    def __post_init__(self) -> None:
        for option, value, least in (
            ("--lengths", min(self.lengths), 1),
            ("--tokens", self.tokens, 1),
            ("--layers", self.layers, 1),
            ("--steps", self.steps, 1),
            ("--warmup", self.warmup, 0),
        ):
            if value is not None and value < least:
                raise ConfigError(option, value, "is too small", f"Set {least} or more")


def case_overrides(size: str, stack: Stack, length: int, tokens: int, layers: int, recompute: str) -> list[str]:
    """Settings of one measurement."""
    return [
        f"+model={size}_{stack.model}",
        "parallel.tp=1",
        "parallel.sequence_parallel=false",
        f"model.num_layers={layers}",
        f"train.seq_length={length}",
        f"train.global_batch_size={max(tokens // length, 1)}",
        "train.micro_batch_size=1",
        f"train.recompute={recompute}",
        *stack.settings,
    ]


def choose_layers(request: Request, stacks: Sequence[Stack], length: int, hardware: Hardware) -> tuple[int, str]:
    """Choose layers that fit with every stack, and the recomputation.

    Uses the least recomputation with which any number of layers fits. The number is `request.layers`, or else the
    largest multiple of four that repeats every layout and leaves a tenth of the memory free for fragmentation.

    Raises:
        ConfigError: the layers don't fit even with full recomputation, or a layout is repeated to no such number.
    """
    counts = [request.layers] if request.layers else _layer_counts(request.layouts)
    for recompute in ("none", "mlp", "full"):
        for count in counts:
            settings = (
                case_overrides(request.size, stack, length, request.tokens, count, recompute) for stack in stacks
            )
            plans = (_plan([*each, *request.overrides], hardware) for each in settings)  # up to one that doesn't fit
            if all(plan.fits_with_room for plan in plans):
                return count, recompute
    raise ConfigError(
        "--lengths",
        length,
        f"{counts[-1]} layers don't fit {hardware.name}",
        "Leave it out, or add model.vocab_size=8192 for smaller logits",
    )


def _layer_counts(layouts: Sequence[str]) -> list[int]:
    """Return the multiples of four that repeat every layout, the largest first."""
    problem: ConfigError | None = None
    found = []
    for count in range(32, 0, -4):
        try:
            for letters in layouts:
                parse_layers(letters, count)
            found.append(count)
        except ConfigError as error:
            problem = problem or error  # of the largest
    if not found:
        assert problem is not None
        raise ConfigError("--layouts", problem.value, problem.problem, problem.remedy) from problem
    return found


def _plan(overrides: Sequence[str], hardware: Hardware) -> Plan:
    return preview(compose_run(overrides), 1, hardware)


def measure(task: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Measure a task: `steps` steps after `warmup` ones, as a `Row`."""
    from s2train.comparison.short_runs import run_steps  # imports Megatron, which the requesting process doesn't need

    cfg, hardware = compose_run(task["overrides"]), detect_own()
    plan = check(cfg, 1, hardware)
    import_libraries(cfg, hybrid_layout(cfg), hardware)
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
    """Run the measuring process, which answers cases from standard input."""
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
    request: Request, stacks: Sequence[Stack], output: Path, command: list[str], made_by: dict[str, Any], say: Any
) -> list[Row]:
    """Measure the cases missing in OUTPUT.json, which is written after each.

    A stack that fails is logged and left out.

    Args:
        command: Python's arguments for a process that calls `serve_cases`.
        made_by: command, device and versions, the first entries of the file.

    Raises:
        ConfigError: too few layers fit at one of the lengths, or the file has results of another request or device;
            nothing was measured.
    """
    path = output.with_name(output.name + ".json")
    before: dict[str, Any] = {}
    rows: list[Row] = []
    if path.is_file():
        with reading("output", path):
            before = json.loads(path.read_text())
            _check_same_request(before, request, made_by, path)
            rows = [Row(**row) for row in before["rows"]]
    earlier = [*before.get("earlier_commands", []), *([before["command"]] if "command" in before else [])]
    hardware = detect_own()
    # all lengths first, so that one that can't fit is rejected before anything is measured
    fits = [
        _measured_with(rows, length) or choose_layers(request, stacks, length, hardware) for length in request.lengths
    ]
    tasks: list[dict[str, Any]] = []
    for length, (layers, recompute) in zip(request.lengths, fits, strict=True):
        for stack in stacks:
            if any((row.way, row.seq_length) == (stack.name, length) for row in rows):
                continue
            overrides = case_overrides(request.size, stack, length, request.tokens, layers, recompute)
            say(f"{stack.name}, {length:,} tokens, {layers} layers, recompute {recompute}")
            settings = [*overrides, *request.overrides]
            task = {"name": stack.name, "stack": " ".join(stack.settings), "overrides": settings}
            tasks.append(task | {"steps": request.steps, "warmup": request.warmup})
    for task, found in zip(tasks, run_tasks(command, tasks, 1, _SECONDS), strict=True):
        if "error" in found:
            say(f"failed: {task['name']}: {found['error']}")
            continue
        rows.append(Row(**found))
        say(f"measured: {rows[-1].way}, {rows[-1].seq_length:,} tokens: {rows[-1].step_s:.3f} s per step")
        content = {**made_by, "earlier_commands": earlier, "request": asdict(request)}
        write_json(path, content | {"rows": [asdict(row) for row in rows]})
    return rows


def _measured_with(rows: Sequence[Row], length: int) -> tuple[int, str] | None:
    """Return layers and recomputation of a length's rows.

    Further rows must have the same to be compared. None if there are no rows.
    """
    found = {(row.layers, row.recompute) for row in rows if row.seq_length == length}
    return found.pop() if len(found) == 1 else None


def _check_same_request(before: dict[str, Any], request: Request, made_by: dict[str, Any], path: Path) -> None:
    """Check that a file's rows answer this request.

    Other lengths and layouts may join them.

    Raises:
        ConfigError: they answer another one, or were measured on another device.
    """
    now = {**asdict(request), "device": made_by["device"]}
    earlier = {**before.get("request", {}), "device": before.get("device")}
    free = ("lengths", "layouts")
    if others := [name for name, value in now.items() if name not in free and earlier.get(name) != value]:
        problem = f"has results with another {', '.join(others)}"
        raise ConfigError("output", path, problem, "Name another file, or move this one away")
