"""Variants of the Hopper forward, checked and timed: `python -m s2train.kernels.tune_hopper [--json FILE]`.

Every feature is first compared with a float64 oracle, in several processes that also compile all variants. Then
one process compares every variant with a float32 oracle and times it (median); it is replaced where a variant
breaks the CUDA context or hangs, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from . import spec
from .check_cases import CASES, Case
from .check_run import check_forward
from .forward import forward
from .hopper_forward import CONFIGS, HopperConfig, hopper_forward
from .layout import BlockLayout
from .spec import AttentionSpec, to_bhsd

_SILENCE = 60.0  # seconds without a line after which an item hangs
_VARIANTS: dict[str, HopperConfig | None] = {
    "q2 k2 v3": HopperConfig(2, 2, 3),
    "q2 k2 v3 late": HopperConfig(2, 2, 3, late_decay=True),
    "q2 k3 v2": HopperConfig(2, 3, 2),
    "q1 k3 v3": HopperConfig(1, 3, 3),
    "q1 k3 v3 late": HopperConfig(1, 3, 3, late_decay=True),
    "q2 k2 v2": HopperConfig(2, 2, 2),
    "d 64": CONFIGS[64],
    "d 64 late": HopperConfig(2, 4, 4, late_decay=True),
    "portable": None,  # the Triton kernel
}
_LOCAL = {128: 8, 64: 16}
_STRIDE = 16
_HEADS = 32


@dataclass(frozen=True)
class Item:
    """A variant's time on the local + vertical mask, bfloat16, batch 1, 32 heads; length 0: only compile it."""

    variant: str
    length: int
    block: int
    kv_heads: int = _HEADS
    dim: int = 128

    @property
    def problem(self) -> str:
        heads = "" if self.kv_heads == _HEADS else f" {_HEADS}/{self.kv_heads}"
        return f"{self.length // 1024}k B={self.block}{heads}" + (f" d {self.dim}" if self.dim != 128 else "")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m s2train.kernels.tune_hopper", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all results there")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes that check")
    parser.add_argument("--no-check", action="store_true", help="only time")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # its tasks, as JSON
    args = parser.parse_args()
    if args.child is not None:
        _run_tasks(json.loads(args.child))
        return 0
    started = time.monotonic()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    items = _items(args.lengths)
    tasks = [] if args.no_check else _features()
    compiled = {(i.variant, i.block, i.dim): Item(i.variant, 0, i.block, dim=i.dim) for i in items}
    tasks += [[_task(item)] for item in compiled.values()]
    shares: list[list[dict[str, Any]]] = [[] for _ in range(args.jobs)]
    for n, group in enumerate(tasks):
        shares[n % args.jobs] += group
    with ThreadPoolExecutor(args.jobs) as pool:
        checks = [row for rows in pool.map(_in_processes, shares) for row in rows]
    for row in checks:
        if not row["ok"] or "kernel" in row:
            print(_check_line(row), flush=True)
    print(f"{len(checks)} checked or compiled in {time.monotonic() - started:.0f} s", flush=True)
    timings = _in_processes([_task(item) for item in items], echo=True)
    _print_table(timings)
    failed = [row["task"] for row in checks + timings if not row["ok"]]
    print(f"{len(checks) + len(timings)} items, {len(failed)} failed, {time.monotonic() - started:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"checks": checks, "timings": timings}, indent=1))
    return 1 if failed else 0


def _items(lengths: list[int]) -> list[Item]:
    items = []
    for length in lengths:
        for block in (128, 64):
            items += [Item(variant, length, block) for variant in _VARIANTS if "d 64" not in variant]
            items += [Item(variant, length, block, kv_heads=8) for variant in ("q2 k2 v3", "q1 k3 v3")]
    items += [Item(variant, lengths[0], b, dim=64) for b in (128, 64) for variant in ("d 64", "d 64 late")]
    # by problem, so that its tensors are made once
    return sorted(items, key=lambda item: (item.length, item.dim, item.block, item.kv_heads))


def _features() -> list[list[dict[str, Any]]]:
    """Comparisons in groups that compile one kernel."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for case in CASES.values():
        if case.dtype != "float32" and case.block >= 64 and case.dim <= 128 and not case.documents:
            kernel = (case.dtype, min(case.block, 128), case.dim > 64, (case.v_dim or case.dim) > 64, case.causal)
            groups.setdefault(kernel, []).append({"name": case.name, "case": asdict(case)})
    return list(groups.values())


def _task(item: Item) -> dict[str, Any]:
    return {"name": f"{item.problem if item.length else 'compile'} {item.variant}", "item": asdict(item)}


def _in_processes(tasks: list[dict[str, Any]], echo: bool = False) -> list[dict[str, Any]]:
    """Results of the tasks in order, from a process that is replaced after a crash or a silence."""
    rows: list[dict[str, Any]] = []
    while len(rows) < len(tasks):
        left = tasks[len(rows) :]
        command = [sys.executable, "-m", "s2train.kernels.tune_hopper", "--child", json.dumps(left)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        errors: list[str] = []
        assert child.stdout
        assert child.stderr
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pump, args=(child.stdout, lines.put), daemon=True).start()
        threading.Thread(target=_pump, args=(child.stderr, errors.append), daemon=True).start()
        reason = "exit"
        while len(rows) < len(tasks):
            try:
                line = lines.get(timeout=_SILENCE)
            except queue.Empty:
                reason = f"nothing for {_SILENCE:.0f} s"
                break
            if line is None:
                break
            if line.startswith("{"):
                rows.append(json.loads(line))
                if echo:
                    print(_timing_line(rows[-1]), flush=True)
        child.kill()
        child.wait()
        if len(rows) < len(tasks):
            last = next((x.strip() for x in reversed(errors) if x and x.strip()), "")
            error = f"{reason} {child.returncode}: {last}"[:200]
            rows.append({"task": tasks[len(rows)]["name"], "ok": False, "error": error})
            if echo:
                print(_timing_line(rows[-1]), flush=True)
    return rows


def _pump(stream: Any, put: Any) -> None:
    for line in stream:
        put(line)
    put(None)


def _run_tasks(tasks: list[dict[str, Any]]) -> None:
    spec.empty = lambda shape, dtype, device: torch.full(shape, torch.nan, dtype=dtype, device=device)
    problems: dict[Any, Problem] = {}
    for task in tasks:
        torch.manual_seed(0)
        try:
            if "case" in task:
                row = check_forward(Case(**task["case"]), torch.device("cuda"))
                torch.cuda.synchronize()
            else:
                row = _run_item(Item(**task["item"]), problems)
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
            print(json.dumps({"task": task["name"], "ok": False, "error": text}), flush=True)
            if "CUDA" in text or isinstance(error, torch.AcceleratorError):
                os._exit(3)  # the context is gone
            continue
        print(json.dumps({"task": task["name"]} | row), flush=True)


@dataclass(frozen=True)
class Problem:
    """Tensors as views [b, h, s, d], the layout and its patterns, and exact rows of some heads."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: BlockLayout
    flops: float
    exact: list[tuple[int, int, int, Tensor, Tensor]]


def _run_item(item: Item, problems: dict[Any, Problem]) -> dict[str, Any]:
    length = item.length or 512
    key = (length, item.block, item.kv_heads, item.dim)
    if key not in problems:
        problems.clear()
        torch.cuda.empty_cache()
        problems[key] = _problem(length, item)
    p = problems[key]
    settings = AttentionSpec(1 / math.sqrt(item.dim), True, 0, None, "sbhd")
    config = _VARIANTS[item.variant]

    def run() -> tuple[Tensor, Tensor]:
        if config is None:
            return forward(p.q, p.k, p.v, p.layout, settings)
        return hopper_forward(p.q, p.k, p.v, p.layout, settings, config)

    out, lse = run()
    errors, lse_error = [], 0.0
    for head, start, stop, out_rows, lse_rows in p.exact:
        measured = out[0, head, start:stop].float()
        errors.append(((measured - out_rows).norm() / out_rows.norm()).item())
        lse_error = max(lse_error, (lse[0, head, start:stop] - lse_rows).abs().max().item())
    complete = not bool(out.isnan().any() | lse.isnan().any())
    error = max(errors) if all(e == e for e in errors) else math.nan
    row = {"problem": item.problem, "variant": item.variant, "error": error, "lse_error": lse_error}
    row["ok"] = complete and error < 6e-3 and lse_error < 2e-3
    if not row["ok"]:
        return row | {"error": f"wrong: out {errors}, lse {lse_error:.1e}, complete {complete}"}
    if item.length:
        spec.empty = lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device=device)
        ms = triton.testing.do_bench(run, warmup=40, rep=120, return_mode="median")
        spec.empty = lambda shape, dtype, device: torch.full(shape, torch.nan, dtype=dtype, device=device)
        row |= {"ms": ms, "tflops": p.flops / ms / 1e9}
    return row


def _problem(length: int, item: Item) -> Problem:
    q, k, v = (
        to_bhsd(torch.randn(length, 1, heads, item.dim, device="cuda", dtype=torch.bfloat16), "sbhd")
        for heads in (_HEADS, item.kv_heads, item.kv_heads)
    )
    block = torch.arange(length // item.block, device="cuda")
    distance = block[:, None] - block
    vertical = [(block + 1 + head) % _STRIDE == 0 for head in range(_STRIDE)]
    patterns = torch.stack([((distance < _LOCAL[item.block]) | column) & (distance >= 0) for column in vertical])
    layout = BlockLayout.from_patterns(patterns, [h % _STRIDE for h in range(_HEADS)], item.block)
    below = patterns.sum((1, 2)) - len(block)
    kept = below * item.block**2 + len(block) * item.block * (item.block + 1) // 2
    flops = 4.0 * item.dim * float(kept.sum()) * (_HEADS // _STRIDE)
    middle = length // 2 // 128 * 128
    rows = [(3, 0, min(length, 1024)), (17, 0, 256), (5, length - 256, length), (30, middle, middle + 128)]
    exact = [(head, *_exact(q, k, v, patterns, item, head, start, stop)) for head, start, stop in rows]
    return Problem(q, k, v, layout, flops, exact)


def _exact(
    q: Tensor, k: Tensor, v: Tensor, patterns: Tensor, item: Item, head: int, start: int, stop: int
) -> tuple[int, int, Tensor, Tensor]:
    """Rows [start, stop) of a head's output and log-sum-exp, in float32."""
    kv_head = head // (_HEADS // item.kv_heads)
    scores = q[0, head, start:stop].float() @ k[0, kv_head, :stop].float().T / math.sqrt(item.dim)
    query, key = torch.arange(start, stop, device=q.device), torch.arange(stop, device=q.device)
    keep = patterns[head % _STRIDE][query // item.block][:, key // item.block] & (query[:, None] >= key)
    scores = scores.masked_fill(~keep, -torch.inf)
    return start, stop, torch.softmax(scores, -1) @ v[0, kv_head, :stop].float(), torch.logsumexp(scores, -1)


def _check_line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"FAIL {row['task']:<44} {row['error']}"
    errors = "  ".join(f"{name} {row[name][0]:.1e}/{row[name][1]:.1e}" for name in ("out", "lse"))
    return f"{'ok  ' if row['ok'] else 'FAIL'} {row['task']:<44} {row['kernel']:<6} {errors}"


def _timing_line(row: dict[str, Any]) -> str:
    if "ms" not in row:
        return f"FAIL {row['task']:<40} {row['error']}"
    return f"ok   {row['task']:<40} {row['ms']:.3f} ms {row['tflops']:.0f} TFLOP/s  error {row['error']:.1e}"


def _print_table(rows: list[dict[str, Any]]) -> None:
    times = {(row["problem"], row["variant"]): row for row in rows if "ms" in row}
    problems = list(dict.fromkeys(problem for problem, _ in times))
    print(" " * 16 + "".join(f"{problem:>18}" for problem in problems) + "   (ms, TFLOP/s)")
    for variant in _VARIANTS:
        rows_of_variant = [times.get((problem, variant)) for problem in problems]
        cells = [f"{row['ms']:.3f} {row['tflops']:.0f}" if row else "" for row in rows_of_variant]
        print(f"{variant:<16}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
