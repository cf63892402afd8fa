"""Time HyperAttention phase by phase, and a layer beside dense attention.

Contenders are dense FlashAttention-2 and cuDNN (torch SDPA) and, if installed, FlashAttention-4, on the same random
bfloat16 inputs, batch 1. Before timing, output and gradients are compared with a float64 oracle on a shorter problem,
on the same buckets; an error above twice plain torch's in bfloat16 ends the run. Times are the device's, with the host
ahead; `launch` is a single call from an idle device, forward and backward. Random inputs have no clusters: buckets are
about equally full. --skew moves queries away from keys, so that some buckets are crowded.

The JSON is written after each case. --tune also times other tile sizes of each kernel.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..configs import Config
from ..flash4 import fa4_functions, fa4_problem, fa4_unsupported_reason
from ..hyper import HyperSettings, hyper_attention, launches, reference_hyper_attention
from ..hyper import configs as hyper_configs
from ..hyper.hashing import hash_ranks
from ..hyper.plan import draw_samples, make_plan, ranges_of
from ..hyper.plan import tiles as bucket_tiles
from ..hyper.plan_kernels import find_buckets, sort_keys, sort_queries
from ..provenance import origin
from ..spec import AttentionSpec, to_bhsd
from .contenders import NotSupportedError
from .program import add_device, add_output, check_device, check_output, machine, write_results
from .run import failures
from .timing import Clock, time_passes

Record = dict[str, Any]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
_CASES = ("32k-causal", "131k-causal", "8k-causal", "32k-full", "131k-full", "8k-full")
LENGTHS = {"4k": 4096, "8k": 8192, "16k": 16384, "32k": 32768, "64k": 65536, "131k": 131072, "262k": 262144}
_PHASE_PASSES = 5
_TUNED: dict[hyper_configs.Kernel, tuple[Config, ...]] = {
    "sample forward": (Config(128, 64, 8, 2), Config(64, 64, 4, 3)),
    "bucket forward": (Config(64, 64, 4, 2), Config(64, 64, 4, 3), Config(128, 64, 8, 3)),
    "sample dq": (Config(128, 64, 8, 3), Config(64, 64, 4, 2)),
    "bucket dq": (Config(64, 64, 4, 2), Config(64, 64, 4, 3), Config(128, 64, 8, 3)),
    "sample dkdv": (Config(64, 64, 4, 2), Config(128, 32, 8, 2)),
    "bucket dkdv": (Config(128, 64, 8, 2), Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 on an unexpected failure."""
    args = _parse(arguments)
    began, device, console = time.monotonic(), torch.device(args.device), Console(width=150)
    seed = int.from_bytes(os.urandom(3))
    torch.manual_seed(seed)
    clock = Clock(device)
    data: Record = {
        **origin("kernels.benchmarks.hyper", arguments),
        "machine": machine(device),
        "seed": seed,
        "cases": [],
    }
    data["check"] = {}
    for word in args.cases or ["none-causal", "none-full"]:
        if time.monotonic() - began > args.seconds:
            console.print(f"{word}: not run, out of time")
            continue
        length, _, mask = word.partition("-")
        if mask not in data["check"]:  # not before it is needed: kernels are compiled here
            data["check"][mask] = check(args, device, mask == "causal")
            data["seconds"] = time.monotonic() - began
            write_results(data, args.output)
            console.print(f"{mask}, {data['seconds']:.0f} s: error over plain torch's {data['check'][mask]}")
            if any(not ratio <= 2 for ratio in data["check"][mask].values()):
                console.print("wrong results: nothing more is timed")
                return 1
        if length == "none":
            continue
        data["cases"].append(measure(word, args, clock, device, began + args.seconds))
        data["seconds"] = time.monotonic() - began
        write_results(data, args.output)
        console.print(case_table(data["cases"][-1]))
    excused = ("not supported", "not run", "out of memory")
    errors = [r["error"] for case in data["cases"] for r in case["layers"].values() if "error" in r]
    failed = [error for error in errors if not error.startswith(excused)]
    console.print(f"{len(data['cases'])} cases in {data['seconds']:.0f} s, {len(failed)} failures: {args.output}")
    return int(bool(failed))


def check(args: argparse.Namespace, device: torch.device, causal: bool) -> dict[str, float]:
    """Return errors against float64 over those of plain torch.

    Both are on the same buckets.
    """
    settings, kv_heads = _settings(args), max(1, args.kv_heads // 4)
    length = settings.shortest * 2 + 333 if device.type == "cuda" else settings.shortest + 40
    heads = kv_heads * (args.heads // args.kv_heads)
    q, k, v, dout = _inputs(length, heads, kv_heads, args.dim, device, args.skew)
    seeds = torch.randint(1 << 60, (2, kv_heads), device=device)
    views = to_bhsd(q.detach(), "sbhd"), to_bhsd(k.detach(), "sbhd")
    ranks = (launches.hash_all if device.type == "cuda" else hash_ranks)(*views, seeds[0], settings.projections)

    def results(dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, y, z = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
        out, _ = reference_hyper_attention(x, y, z, settings, seeds[0], seeds[1], causal=causal, ranks=ranks)
        return out, *torch.autograd.grad(out, (x, y, z), dout.to(dtype))

    out = hyper_attention(q, k, v, settings, *seeds, causal=causal)
    ours = (out, *torch.autograd.grad(out, (q, k, v), dout))
    found = zip(("out", "dq", "dk", "dv"), ours, results(torch.float64), results(torch.bfloat16), strict=True)
    return {name: ((x.double() - y).norm() / (z.double() - y).norm()).item() for name, x, y, z in found}


def measure(word: str, args: argparse.Namespace, clock: Clock, device: torch.device, deadline: float) -> Record:
    """Time a case's phases, then the layer and the dense contenders."""
    name, _, mask = word.partition("-")
    length, causal, settings = LENGTHS[name], mask == "causal", _settings(args)
    record: Record = {"case": word, "length": length, "causal": causal, "heads": args.heads, "kv_heads": args.kv_heads}
    record |= {"dim": args.dim, "settings": vars(settings), "skew": args.skew, "phases": {}, "layers": {}}
    inputs = _inputs(length, args.heads, args.kv_heads, args.dim, device, args.skew)
    seeds = torch.randint(1 << 60, (2, args.kv_heads), device=device)
    if device.type == "cuda":
        with failures() as failed:
            record["phases"] = phases(inputs, settings, seeds, causal, clock, args.tune)
        if failed:
            record["layers"]["phases"] = {"error": failed[0]}
    makers: dict[str, tuple[str, Callable[[], Attention]]] = {
        "hyper": ("sbhd", lambda: lambda q, k, v: hyper_attention(q, k, v, settings, *seeds, causal=causal)),
        "fa4": ("bshd", partial(_fa4, device, args.dim, causal)),
        "cudnn": ("bhsd", partial(_sdpa, SDPBackend.CUDNN_ATTENTION, device, causal)),
        "flash2": ("bhsd", partial(_sdpa, SDPBackend.FLASH_ATTENTION, device, causal)),
    }
    for contender, (format, make) in makers.items():
        if time.monotonic() > deadline:
            record["layers"][contender] = {"error": "not run: out of time"}
            continue
        with failures() as failed:
            record["layers"][contender] = layer(make(), inputs, format, clock, args.budget_ms)
        if failed:
            record["layers"][contender] = {"error": failed[0]}
    return record


def layer(attend: Attention, inputs: tuple[Tensor, ...], format: str, clock: Clock, budget_ms: float) -> Record:
    """Time forward, backward, both, and a single call when idle."""
    order = tuple("sbhd".index(axis) for axis in format)
    *leaves, dout = (x.detach().permute(order).contiguous() for x in inputs)
    q, k, v = (x.requires_grad_() for x in leaves)

    def forward() -> Tensor:
        return attend(q, k, v)

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (q, k, v), dout)

    if clock.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if clock.on_gpu else 0
    backward(forward())
    clock.wait()
    peak = torch.cuda.max_memory_allocated() - before if clock.on_gpu else 0
    started = time.perf_counter()
    backward(forward())
    clock.wait()
    launch = 1e3 * (time.perf_counter() - started)
    return time_passes(forward, backward, clock, budget_ms) | {"peak_bytes": peak, "launch_ms": launch}


def phases(
    inputs: tuple[Tensor, ...], settings: HyperSettings, seeds: Tensor, causal: bool, clock: Clock, tune: bool
) -> Record:
    """Return each phase's median ms; with `tune`, other tiles' too."""
    qh, kh, vh, dh = (to_bhsd(x.detach(), "sbhd") for x in inputs)
    spec = AttentionSpec(1 / math.sqrt(qh.shape[-1]), causal, 0, None, "sbhd")
    call = launches.call_of(qh, kh, vh, settings, spec)
    times: Record = {}

    def timed(name: str, run: Callable[[], Any], passes: int = _PHASE_PASSES) -> Any:
        result = run()  # warm
        spans = []
        for _ in range(passes):
            clock.start()
            before = clock.mark()
            run()
            spans.append((before, clock.mark()))
        clock.wait()
        times[name] = median(clock.milliseconds(*span) for span in spans)
        return result

    ranks = timed("hash", lambda: launches.hash_all(qh, kh, seeds[0], settings.projections))
    rows, group = kh.shape[0] * kh.shape[1], qh.shape[1] // kh.shape[1]
    ranges = ranges_of(settings, call.length, causal, rows, group)
    ordered, keys = timed("sort keys", lambda: sort_keys(ranks[1], ranges, settings, causal))
    _, of_all, buckets = timed("find buckets", lambda: find_buckets(ranks[0], ordered, ranges, settings, rows, causal))
    sizes = (call.length, rows, group)
    timed("sort queries", lambda: sort_queries(of_all, buckets, ranges, *sizes, settings, causal))
    timed("draw samples", lambda: draw_samples(keys, ranges, rows, settings, seeds[1]))
    plan = make_plan(ranks[0], ranks[1], settings, seeds[1], causal, kernels=True)
    counts = plan.bucket_starts.diff()
    times["fullest bucket over mean"] = (counts.max() / counts.float().mean()).item()
    k_s, v_s = timed("gather samples", lambda: (launches.sampled(kh, plan), launches.sampled(vh, plan)))
    timed("list tiles", lambda: bucket_tiles(plan, 64))
    local = timed("exact keys", lambda: launches.local_forward(qh, kh, vh, call)) if call.local else None
    sums, lse = timed("samples", lambda: launches.sample_forward(qh, k_s, v_s, local, plan, call))
    timed("buckets", lambda: launches.bucket_forward(qh, kh, vh, sums, lse, plan, call))
    sums, lse = launches.sample_forward(qh, k_s, v_s, local, plan, call)
    launches.bucket_forward(qh, kh, vh, sums, lse, plan, call)
    out = timed("cast output", lambda: sums.to(qh.dtype))
    del sums
    delta = timed("delta", lambda: launches.delta_of(out, dh, lse, None))
    grads = None
    if call.local:
        local_backward = partial(launches.local_backward, qh, kh, vh, out, lse, dh, None, call)
        grads = timed("exact keys backward", local_backward)
    read = launches.Rows(qh, dh, lse, delta)
    dq = timed("samples dq", lambda: launches.sample_dq(read, k_s, v_s, grads[0] if grads else None, plan, call))
    timed("buckets dq", lambda: launches.bucket_dq(read, kh, vh, dq, plan, call))
    dk, dv = (torch.zeros(x.shape, device=x.device) for x in (kh, vh))
    timed("samples dk, dv", lambda: launches.sample_dkdv(read, k_s, v_s, dk, dv, plan, call))
    timed("buckets dk, dv", lambda: launches.bucket_dkdv(read, kh, vh, dk, dv, plan, call))
    timed("cast gradients", lambda: [x.to(qh.dtype) for x in (dq, dk, dv)])
    if tune:
        sums = torch.zeros((*qh.shape[:3], vh.shape[3]), device=qh.device)
        runs: dict[hyper_configs.Kernel, Callable[[], Any]] = {
            "sample forward": lambda: launches.sample_forward(qh, k_s, v_s, None, plan, call),
            "bucket forward": lambda: launches.bucket_forward(qh, kh, vh, sums, lse.clone(), plan, call),
            "sample dq": lambda: launches.sample_dq(read, k_s, v_s, None, plan, call),
            "bucket dq": lambda: launches.bucket_dq(read, kh, vh, dq, plan, call),
            "sample dkdv": lambda: launches.sample_dkdv(read, k_s, v_s, dk, dv, plan, call),
            "bucket dkdv": lambda: launches.bucket_dkdv(read, kh, vh, dk, dv, plan, call),
        }
        times |= _tune(runs, max(64, qh.shape[-1]), timed)
    return times


def _tune(
    runs: dict[hyper_configs.Kernel, Callable[[], Any]], width: int, timed: Callable[[str, Callable[[], Any], int], Any]
) -> Record:
    """Time each kernel with other tiles, and return errors by tiles."""
    errors: Record = {}
    for kernel, run in runs.items():
        kept = hyper_configs.HALF[kernel][width]
        try:
            for config in (kept, *_TUNED[kernel]):
                hyper_configs.HALF[kernel][width] = config
                hyper_configs.config_for.cache_clear()
                words = f"{kernel} {config.rows}x{config.steps} warps {config.num_warps} stages {config.num_stages}"
                with failures() as failed:
                    timed(words, run, 3)
                if failed:
                    errors[words] = failed[0]
        finally:
            hyper_configs.HALF[kernel][width] = kept
            hyper_configs.config_for.cache_clear()
    return errors


def case_table(record: Record) -> Table:
    """Tabulate phases and layers; ratios are the contender's time over ours."""
    title = f"{record['case']}: {record['heads']} heads, {record['kv_heads']} KV heads, head dimension {record['dim']}"
    table = Table(
        "phase ms", "forward ms", "backward ms", "both ms", "over hyper", "one call ms", "GB", title=title, box=None
    )
    ours = record["layers"]["hyper"]
    for name, layer in record["layers"].items():
        if "error" in layer:
            table.add_row(name, layer["error"])
            continue
        ms = layer["ms"]
        ratios = [f"{ms[part] / ours['ms'][part]:.2f}" for part in ms] if "ms" in ours else []
        cells = [f"{ms[part]:.3f}" for part in ("forward", "backward", "both")]
        table.add_row(name, *cells, " / ".join(ratios), f"{layer['launch_ms']:.2f}", f"{layer['peak_bytes'] / 1e9:.2f}")
    for phase, value in record["phases"].items():
        table.add_row(phase, value if isinstance(value, str) else f"{value:.3f}", style="dim")
    return table


def _sdpa(backend: SDPBackend, device: torch.device, causal: bool) -> Attention:
    if device.type != "cuda":
        raise NotSupportedError("needs CUDA")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

    return attend


def _fa4(device: torch.device, dim: int, causal: bool) -> Attention:
    if device.type != "cuda":
        raise NotSupportedError("needs CUDA")
    why = fa4_problem() or fa4_unsupported_reason(torch.cuda.get_device_capability(), torch.bfloat16, dim)
    if why is not None:
        raise NotSupportedError(why)
    whole, _ = fa4_functions()
    return lambda q, k, v: whole(q, k, v, causal=causal)[0]


def _inputs(length: int, heads: int, kv_heads: int, dim: int, device: torch.device, skew: float) -> tuple[Tensor, ...]:
    """Draw q, k, v (leaves) and the output's gradient.

    Queries are moved by `skew`.
    """
    counts = (heads, kv_heads, kv_heads, heads)
    made = [torch.randn(length, 1, h, dim, device=device, dtype=torch.bfloat16) for h in counts]
    made[0] += skew
    return *(x.requires_grad_() for x in made[:3]), made[3]


def _settings(args: argparse.Namespace) -> HyperSettings:
    return HyperSettings(args.bucket, args.samples, args.projections, args.shortest, args.window, args.sinks)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m s2train.kernels.benchmarks.hyper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = [f"{length}-{mask}" for length in LENGTHS for mask in ("causal", "full")]
    parser.add_argument("--cases", nargs="*", default=_CASES, choices=words, metavar="CASE", help=", ".join(words))
    add_output(parser, "hyper")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128)
    for name, value in vars(HyperSettings()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--skew", type=float, default=0.0, help="added to all queries")
    parser.add_argument("--tune", action="store_true", help="time other tile sizes too")
    parser.add_argument("--budget-ms", type=float, default=500, help="device time of one contender's timed passes")
    parser.add_argument("--seconds", type=float, default=75, help="start nothing new after this time")
    add_device(parser)
    args = parser.parse_args(arguments)
    try:
        _settings(args)
    except ValueError as error:
        parser.error(str(error))
    check_output(parser, args)
    check_device(parser, args)
    return args


if __name__ == "__main__":
    sys.exit(main())
