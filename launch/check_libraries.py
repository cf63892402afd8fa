"""Check FlashAttention-4 and Liger-Kernel on this GPU: `python launch/check_libraries.py FOLDER`

Writes dense.json, elementwise.json, losses.json, steps.json and benchmarks.json to FOLDER, each as soon as it is
measured. Uses one GPU and skips libraries that are not installed. Cases that these files report as correct may be
listed in `kernels/verified.py`.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _surroundings  # noqa: F401 (prints why the rest can't start)

from s2train.environment.provenance import environment
from s2train.files import write_json

PARTS = ("dense", "elementwise", "losses", "steps", "benchmarks")
# Variants compared in whole steps: name -> settings. The first uses neither library.
VARIANTS = {
    "torch": ["elementwise=torch", "loss=torch", "dense_attention=cudnn"],
    "torch, FlashAttention-2": ["elementwise=torch", "loss=torch", "dense_attention=flash"],
    "liger": ["elementwise=liger", "loss=liger", "dense_attention=cudnn"],
    "liger, linear loss": ["elementwise=liger", "loss=linear", "dense_attention=cudnn"],
    "liger, loss in place": ["elementwise=liger", "loss=in_place", "dense_attention=cudnn"],
    "fa4": ["elementwise=torch", "loss=torch", "dense_attention=fa4"],
    "liger, fa4": ["elementwise=liger", "loss=liger", "dense_attention=fa4"],
    "liger, loss in place, fa4": ["elementwise=liger", "loss=in_place", "dense_attention=fa4"],
    "liger, linear loss, fa4": ["elementwise=liger", "loss=linear", "dense_attention=fa4"],
}
_WARM_UP = 3  # steps that compile
_STEP_VARIANTS = ("torch", "liger, fa4", "liger, loss in place, fa4", "liger, linear loss, fa4")
_LOSS_VARIANTS = ("torch", "torch, FlashAttention-2", "liger", "liger, loss in place", "liger, linear loss, fa4")
_BENCHMARKS = ["b128-l8-v16-32k", "b128-l8-v16-8k", "b128-l8-v16-32k-kv8"]
_CONTENDERS = ["ours", "flex", "fa4_sparse", "cudnn", "flash2", "fa3", "fa4"]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=150, help="stop a part that takes longer; it has failed")
    parser.add_argument("--operations", nargs="+", help="elementwise: only these operations, such as rotation")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="steps: only these variants")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    try:
        given.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"FOLDER {given.folder} can't be written ({error.strerror}): name another")
    if given.part is not None:
        if given.part == "elementwise":
            elementwise(given.folder, given.operations)
        elif given.part == "losses":
            losses(given.folder)
        else:
            steps(given.folder, given.variants or _STEP_VARIANTS)
        return
    own = [sys.executable, str(Path(__file__).resolve()), str(given.folder)]
    own += ["--operations", *given.operations] if given.operations else []
    own += ["--variants", *given.variants] if given.variants else []
    own += ["--part"]
    kernels = [sys.executable, "-m"]
    commands = {
        "dense": [*kernels, "s2train.kernels.check.dense", str(given.folder / "dense.json")],
        "benchmarks": [*kernels, "s2train.kernels.benchmarks", "--output", str(given.folder / "benchmarks.json"),
                       "--cases", *_BENCHMARKS, "--contenders", *_CONTENDERS, "--launches", "--budget-ms", "300",
                       "--seconds", "70"],
    }  # fmt: skip
    failed = []
    for part in given.parts:
        began = time.monotonic()
        print(f"== {part}", flush=True)
        try:
            if status := subprocess.run(commands.get(part, [*own, part]), timeout=given.seconds).returncode:
                failed.append(f"{part} (status {status})")
        except subprocess.TimeoutExpired:
            failed.append(f"{part} (took longer than --seconds {given.seconds:g}; set more)")
        print(f"== {part}: {time.monotonic() - began:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _origin() -> dict[str, Any]:
    return {"command": f"python launch/check_libraries.py ({shlex.join(sys.argv[1:])})", **environment()}


def elementwise(folder: Path, names: list[str] | None) -> None:
    """Check and time norm, SwiGLU, loss and RoPE, or those named."""
    import torch
    from s2train.kernels.benchmarks.timing import Clock

    from s2train.comparison.elementwise import check, measure, operations
    from s2train.megatron import setup
    from s2train.planning import compose_run

    device = setup.initialize(compose_run(["+model=1b_hybrid"]).parallel, seed=1)
    torch.manual_seed(int.from_bytes(os.urandom(3)))
    data: dict[str, Any] = {**_origin(), "checks": [], "times": []}
    clock = Clock(device)
    for operation in operations(2048, 8192, 32768, 32, 8):
        if names and operation.name not in names:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            data["checks"] += check(operation, dtype)
        data["times"] += measure(operation, clock)
        write_json(folder / "elementwise.json", data)
        torch.cuda.empty_cache()
    for row in [*data["checks"], *data["times"]]:
        print({key: value for key, value in row.items() if key != "limits"}, flush=True)
    setup.shutdown()


def losses(folder: Path) -> None:
    """Compare losses over 20 steps of the 125M hybrid with rounding differences."""
    base = ["+model=125m_hybrid", "train.global_batch_size=2", "train.micro_batch_size=2", "optim.warmup_steps=2"]
    fp32 = ["train.precision=fp32", "train.seq_length=2048", "dense_attention=efficient"]
    runs = {f"bf16 {name}": [*base, *VARIANTS[name]] for name in _LOSS_VARIANTS}
    for name in ("torch", "liger", "liger, loss in place", "liger, linear loss"):
        runs[f"fp32 {name}"] = [*base, *VARIANTS[name][:2], *fp32]
    runs["fp32 torch, attention in torch"] = [*base, *VARIANTS["torch"][:2], *fp32, "attention_backend=torch"]
    _train(folder / "losses.json", runs, steps=20, traced=False)
    print_gaps(json.loads((folder / "losses.json").read_text())["runs"])


def print_gaps(runs: dict[str, dict[str, Any]]) -> None:
    """Print each run's largest and mean loss difference from its reference.

    The reference is the first run in the same precision.
    """
    for name, row in runs.items():
        first = runs[f"{name.split()[0]} torch"]
        if "losses" in row and "losses" in first and row is not first:
            gaps = [abs(x - y) for x, y in zip(row["losses"], first["losses"], strict=True)]
            print(f"{name}: losses differ by {max(gaps):.2e} at most, {sum(gaps) / len(gaps):.2e} on the mean")


def steps(folder: Path, names: Sequence[str]) -> None:
    """Measure steps of the 1B hybrid on two sequences of 32k.

    The steps are those of `launch/scaling.py`.
    """
    base = ["+model=1b_hybrid", "train.seq_length=32768", "train.global_batch_size=2"]
    _train(folder / "steps.json", {name: [*base, *VARIANTS[name]] for name in names}, steps=6, traced=True)


def _train(path: Path, runs: dict[str, list[str]], steps: int, traced: bool) -> None:
    from s2train.comparison.short_runs import free_memory, run_steps
    from s2train.environment.hardware import detect_own
    from s2train.megatron import setup
    from s2train.planning import compose_run, preview

    first = compose_run(next(iter(runs.values())))
    device = setup.initialize(first.parallel, first.seed)
    setup.connect(first.parallel, device)
    data: dict[str, Any] = {**_origin(), "runs": {}}
    hardware = detect_own()
    for name, overrides in runs.items():
        row: dict[str, Any] = {"settings": overrides}
        try:
            cfg = compose_run([*overrides, "layer_backend=local"])
            plan = preview(cfg, 1, hardware)
            row["planned_bytes"] = plan.memory.total - plan.memory.overhead
            if plan.prediction is not None:
                row["planned_s"], row["planned_parts_s"] = plan.prediction.time.total, plan.prediction.time.parts()
            row |= asdict(run_steps(cfg, steps, device, traced=traced))
            step_s = row["step_s"] = statistics.median(row["seconds"][_WARM_UP:])
            peak = hardware.peak_flops(cfg.train.precision)
            tokens = cfg.train.global_batch_size * cfg.train.seq_length
            row["mfu"] = tokens * plan.flops.sparse / step_s / peak if peak else None
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:400]
        free_memory()  # of a failed run, whose error referenced it until here
        data["runs"][name] = row
        write_json(path, data)
        print(name, {k: v for k, v in row.items() if k not in ("settings", "kernels", "planned_parts_s")}, flush=True)
    setup.shutdown()


if __name__ == "__main__":
    main()
