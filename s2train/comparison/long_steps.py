"""Step time of layers of a model at long sequences, hybrid beside dense.

Each measurement is a process of its own: random tokens, the whole step with gradients' norm and optimizer, nothing
saved. The same number of layers at a length for every way of attending, as many as the plan says fit.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from s2train.config import PretrainConfig
from s2train.errors import ConfigError, TrainingError
from s2train.files import replacing
from s2train.hardware import Hardware, detect_own
from s2train.planning import Plan, check, compose_run, preview
from s2train.planning.memory import GIB

_MARK = "measured: "
# What is compared: name, the model's variant, dense layers' implementation.
WAYS = (("hybrid", "hybrid", "auto"), ("dense cuDNN", "dense", "cudnn"), ("dense FlashAttention-2", "dense", "flash"))
CPU_WAYS = (("hybrid", "hybrid", "auto"), ("dense", "dense", "auto"))


@dataclass(frozen=True)
class Row:
    """One way at one length.

    Attributes:
        step_s: median of the measured steps' seconds; `slowest_s` their maximum.
        flops_per_token: training FLOPs over kept positions, which MFU counts; recomputation is not counted.
        planned_gib, peak_gib: tensors on the device, as the plan foretold and as measured; 0 on a CPU.
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


def case_overrides(
    size: str, way: tuple[str, str, str], length: int, tokens: int, layers: int, recompute: str
) -> list[str]:
    """Settings of one measurement."""
    _, variant, implementation = way
    return [
        f"+model={size}_{variant}",
        "parallel.tp=1",
        "parallel.sequence_parallel=false",
        f"model.num_layers={layers}",
        f"train.seq_length={length}",
        f"train.global_batch_size={max(tokens // length, 1)}",
        "train.micro_batch_size=1",
        f"train.recompute={recompute}",
        f"dense_attention={implementation}",
    ]


def fitting(
    size: str, length: int, tokens: int, layers: int | None, hardware: Hardware, extra: Sequence[str]
) -> tuple[int, str]:
    """How many layers of both variants fit, and with how much recomputation: none, if four layers fit so.

    Args:
        layers: that many; None: whole groups of four, as many as fit with a tenth of the memory to spare (fragments).
    Raises:
        ConfigError: not even so many, or four, fit with full recomputation.
    """
    counts = [layers] if layers else list(range(32, 0, -4))
    for recompute in ("none", "full"):
        for count in counts:
            plans = [
                _plan(case_overrides(size, way, length, tokens, count, recompute), extra, hardware) for way in WAYS[:2]
            ]
            if all(plan.memory.total <= 0.9 * hardware.memory for plan in plans):
                return count, recompute
    raise ConfigError(
        "--lengths",
        length,
        f"{counts[-1]} layers don't fit {hardware.name}",
        "Leave it out, or add model.vocab_size=8192: its logits are smaller",
    )


def _plan(overrides: Sequence[str], extra: Sequence[str], hardware: Hardware) -> Plan:
    return preview(compose_run([*overrides, *extra]), 1, hardware)


def measure(name: str, overrides: Sequence[str], steps: int, warmup: int) -> Row:
    """Run in this process, alone on its device; `warmup` steps are not measured."""
    cfg = compose_run(overrides)
    hardware = detect_own()
    plan = check(cfg, 1, hardware)
    from megatron.core.timers import Timers  # slow to import, and not needed by the process that starts these

    from s2train.megatron import setup
    from s2train.megatron.backends import backend_of
    from s2train.megatron.model import build_model, transformer_config
    from s2train.planning import hybrid_layout
    from s2train.training.optimizer import build_optimizer, wrap_data_parallel
    from s2train.training.steps import run_step

    device = setup.initialize(cfg.parallel, cfg.seed)
    setup.connect(cfg.parallel, device)
    megatron_config = transformer_config(cfg)
    megatron_config.timers = Timers(log_level=0, log_option="minmax")
    models = build_model(cfg, megatron_config, hybrid_layout(cfg), backend_of(cfg), device)
    chunks = wrap_data_parallel(cfg, megatron_config, models)
    optimizer, _ = build_optimizer(cfg, megatron_config, chunks)
    batches = _random_batches(cfg, device)
    times = []
    for _ in range(warmup + steps):
        started = time.perf_counter()
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        run_step(cfg, chunks, [batches], forward_only=False)
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    measured = times[warmup:]
    step_s = statistics.median(measured)
    tokens_per_s = cfg.train.global_batch_size * cfg.train.seq_length / step_s
    peak = hardware.peak_flops(cfg.train.precision)
    row = Row(
        way=name,
        seq_length=cfg.train.seq_length,
        layers=cfg.model.num_layers,
        recompute=cfg.train.recompute,
        sequences_a_step=cfg.train.global_batch_size,
        steps=steps,
        step_s=step_s,
        slowest_s=max(measured),
        tokens_per_s=tokens_per_s,
        flops_per_token=plan.flops.sparse,
        mfu=tokens_per_s * plan.flops.sparse / peak if peak else None,
        planned_gib=(plan.memory.total - plan.memory.overhead) / GIB if device.type == "cuda" else 0.0,
        peak_gib=torch.cuda.max_memory_allocated() / GIB,
    )
    setup.shutdown()
    return row


def _random_batches(cfg: PretrainConfig, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    shape = (cfg.train.micro_batch_size, cfg.train.seq_length)
    while True:
        tokens = torch.randint(cfg.model.vocab_size, shape, device=device)
        yield {
            "tokens": tokens,
            "labels": tokens.roll(-1, dims=1),
            "loss_mask": torch.ones(shape, device=device),
            "position_ids": torch.arange(shape[1], device=device).expand(shape).contiguous(),
        }


def run_apart(command: Sequence[str], name: str, overrides: Sequence[str], steps: int, warmup: int) -> Row:
    """`measure` in a process of its own, started as `command` with the case as its last argument.

    Raises:
        TrainingError: it failed; with the last line of its errors.
    """
    case = json.dumps({"name": name, "overrides": list(overrides), "steps": steps, "warmup": warmup})
    done = subprocess.run([*command, "--case", case], capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not found:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        telling = [line for line in lines if "Error" in line or "error" in line]
        raise TrainingError(f"{name}: {(telling or lines)[-1]}")
    return Row(**json.loads(found[-1].removeprefix(_MARK)))


def run_case(case: str) -> None:
    """The other end of `run_apart`."""
    print(_MARK + json.dumps(asdict(measure(**json.loads(case)))), flush=True)


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


def measure_all(request: Request, output: Path, made_by: dict[str, Any], say: Any) -> list[Row]:
    """Measure what OUTPUT.json has not yet, writing it after each; a way that fails is left out, and told.

    Args:
        made_by: command, device, versions: what the file begins with.

    Raises:
        ConfigError: no four layers fit at one of the lengths; nothing was measured.
    """
    path = output.with_name(output.name + ".json")
    rows = [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.is_file() else []
    hardware = detect_own()
    ways = WAYS if hardware.kind == "cuda" else CPU_WAYS
    command = [sys.executable, str(Path(__file__).parents[2] / "launch" / "long_steps.py"), str(output)]
    # all of them first: what can't fit is told before anything is measured
    fits = [
        fitting(request.size, length, request.tokens, request.layers, hardware, request.overrides)
        for length in request.lengths
    ]
    for length, (layers, recompute) in zip(request.lengths, fits, strict=True):
        for way in ways:
            if any((row.way, row.seq_length) == (way[0], length) for row in rows):
                continue
            overrides = case_overrides(request.size, way, length, request.tokens, layers, recompute)
            say(f"{way[0]}, {length:,} tokens, {layers} layers, recompute {recompute} …")
            try:
                rows.append(run_apart(command, way[0], [*overrides, *request.overrides], request.steps, request.warmup))
            except TrainingError as error:
                say(f"failed: {error}")
                continue
            with replacing(path) as temporary:
                content = {**made_by, "request": asdict(request), "rows": [asdict(row) for row in rows]}
                temporary.write_text(json.dumps(content, indent=1) + "\n")
    return rows
