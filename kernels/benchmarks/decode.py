"""Time one layer's attention in a decoding step.

For each mask, head schedule, length and batch it compares: ours over the pages that the layout keeps, the same kernel
over all pages, and torch's SDPA over contiguous keys (the fastest of its fused kernels). Inputs are random bfloat16.
Each contender is first compared with float64 at the same length, and is not timed if its error exceeds twice that of
plain torch in bfloat16. ms: device time, caches emptied, with the host ahead; host_us: launching; graph_ms: from a CUDA
graph. GB/s counts the keys and values read. KV bytes are counted in the pages and predicted by the layout's rule. The
largest batch is what fits into --memory-gb with --weights-gb, with all --layers dense, all sparse, or one dense in
--dense-every.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..attention import resolve_backend
from ..decode.schedule import decode_schedule
from ..provenance import origin
from .cases import parse_case, tokens
from .decode_problem import FUSED, ContiguousStep, DecodeCase, PagedStep, errors
from .program import add_device, add_output, check_device, check_output, machine, write_results
from .timing import Clock, launch_costs

Record = dict[str, Any]
MASKS = ("b128-l8-v16", "b64-l16-v16")
LENGTHS = ("8k", "32k", "128k")
GB = 1e9


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Return 1 on a wrong result or unexpected failure.
    """
    args = _parse(arguments)
    device = torch.device(args.device)
    clock, console = Clock(device), Console(width=200)
    seed = int.from_bytes(os.urandom(3))
    torch.manual_seed(seed)
    data: Record = {
        **origin("kernels.benchmarks.decode", arguments),
        "machine": machine(device),
        "seed": seed,
        "cases": [],
    }
    deadline = time.monotonic() + args.seconds
    table = _table()
    for step in _cases(args):
        record = measure(step, args, clock, device, deadline)
        data["cases"].append(record)
        write_results(data, args.output)
        table.add_row(*_row(record))
        console.print(f"{record['case']}: {_describe(record)}")
    console.print(table)
    failures = [r["error"] for c in data["cases"] for r in c["results"].values() if "error" in r]
    failures = [error for error in failures if not error.startswith(("out of memory", "not run", "not supported"))]
    mispredicted = [
        c["case"] for c in data["cases"] if c["kv_bytes"]["sparse"] not in (None, c["kv_bytes"]["predicted"])
    ]
    console.print(
        f"{len(data['cases'])} cases, {len(failures)} failures, {len(mispredicted)} mispredicted: {args.output}"
    )
    return int(bool(failures or mispredicted))


def measure(step: DecodeCase, args: argparse.Namespace, clock: Clock, device: torch.device, deadline: float) -> Record:
    """Measure every contender; also return bytes and the batches that fit.

    Figures are under "results", or the reason why there are none.
    """
    backend = resolve_backend("auto", device)
    case = step.case
    layout = step.layout(device)
    schedule = decode_schedule(layout, case.kv_heads)
    walked = schedule.offsets.view(-1)
    row = case.length // case.block - 1
    n_q = layout.num_query_blocks
    counts = [int(walked[int(w) * n_q + row + 1] - walked[int(w) * n_q + row]) for w in schedule.list_of_tile]
    read = {"sparse": step.batch * sum(counts) * step.page_bytes, "dense": step.dense_bytes}
    in_use: dict[str, int | None] = {"sparse": None, "dense": None}
    results: Record = {}
    makers: dict[str, Callable[[], PagedStep | ContiguousStep]] = {
        "sparse": lambda: PagedStep(step, layout, backend, device, args.splits),
        "dense": lambda: PagedStep(step, None, backend, device, args.splits),
    }
    fused = [name for name in FUSED if (name == "math") == (device.type != "cuda")]
    makers |= {f"sdpa {name}": partial(ContiguousStep, step, name, device) for name in fused}
    for name, make in makers.items():
        if time.monotonic() > deadline:
            results[name] = {"error": "not run: out of time"}
            continue
        results[name] = _figures(make, case.kv_heads, clock, in_use, name)
        if "device_ms" in results[name]:
            results[name]["gb_per_s"] = (
                read["sparse" if name == "sparse" else "dense"] / results[name]["device_ms"] / 1e6
            )
        _empty(device)
    kv = in_use | {"predicted": step.predicted_bytes(), "dense": step.dense_bytes}
    return {
        "case": step.name, "mask": case.mask_name, "length": case.length, "batch": step.batch, "heads": case.heads,
        "kv_heads": case.kv_heads, "dim": case.dim, "grouped": step.grouped, "results": results, "kv_bytes": kv,
        "read_bytes": read, "walk_bytes": schedule.columns.nbytes * (schedule.bits is not None) * 2 + layout.nbytes,
        "largest_batch": _largest_batches(kv, step.batch, args),
    }  # fmt: skip


def _figures(
    make: Callable[[], PagedStep | ContiguousStep],
    kv_heads: int,
    clock: Clock,
    in_use: dict[str, int | None],
    name: str,
) -> Record:
    try:
        with torch.no_grad():
            step = make()
            if isinstance(step, PagedStep):
                in_use[name] = step.bytes_in_use
            error, allowed = errors(step, kv_heads)
            if not error <= 2 * allowed:
                return {"error": f"wrong: relative error {error:.1e}, plain torch {allowed:.1e}"}
            for _ in range(2):
                step()
            return launch_costs(step, clock) | {"relative_error": error, "plain_error": allowed}
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        return {"error": f"not supported: {reason}" if name.startswith("sdpa") else reason}


def _empty(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _largest_batches(kv: dict[str, int | None], batch: int, args: argparse.Namespace) -> dict[str, int]:
    """Return how many sequences fit, from bytes per sequence and layer."""
    sparse, dense = kv["sparse"] or kv["predicted"], kv["dense"]
    assert sparse is not None
    assert dense is not None
    room = (args.memory_gb - args.weights_gb) * GB
    dense_layers = args.layers // args.dense_every
    layers = {
        "dense": (args.layers, 0),
        "sparse": (0, args.layers),
        "hybrid": (dense_layers, args.layers - dense_layers),
    }
    return {name: int(room // ((d * dense + s * sparse) / batch)) for name, (d, s) in layers.items()}


def best_sdpa(results: Record) -> tuple[str, float] | None:
    """Return the fastest of torch's kernels and its ms."""
    times = [(r["device_ms"], name.removeprefix("sdpa ")) for name, r in results.items() if name.startswith("sdpa")
             and "device_ms" in r]  # fmt: skip
    return (min(times)[1], min(times)[0]) if times else None


def _table() -> Table:
    table = Table(title="One layer's attention, one token a sequence")
    names = ["heads", "mask", "tokens", "batch", "sparse ms", "dense ms", "SDPA ms", "dense / sparse", "SDPA / sparse"]
    names += ["GB/s sparse", "GB/s dense", "host us", "KV MB", "predicted", "dense KV", "fit (d/h/s)"]
    for name in names:
        table.add_column(name, justify="right", no_wrap=name == "fit (d/h/s)")
    return table


def _row(record: Record) -> list[str]:
    results, kv, fits = record["results"], record["kv_bytes"], record["largest_batch"]
    sparse, dense = results["sparse"], results["dense"]
    sdpa = best_sdpa(results)

    def ms(result: Record) -> str:
        return f"{result['device_ms']:.4f}" if "device_ms" in result else result["error"][:16]

    def ratio(other: float | None) -> str:
        return f"{other / sparse['device_ms']:.2f}" if other and "device_ms" in sparse else "-"

    heads = f"{record['heads']}/{record['kv_heads']}"
    mask = record["mask"] + (" grouped" if record["grouped"] else "")
    megabytes = [f"{x / 1e6:,.1f}" if x else "-" for x in (kv["sparse"], kv["predicted"], kv["dense"])]
    return [
        heads, mask, tokens(record["length"]), str(record["batch"]), ms(sparse), ms(dense),
        f"{sdpa[1]:.4f} {sdpa[0]}" if sdpa else "-", ratio(dense.get("device_ms")), ratio(sdpa[1] if sdpa else None),
        *(f"{r['gb_per_s']:,.0f}" if "gb_per_s" in r else "-" for r in (sparse, dense)),
        f"{sparse['host_us']:.0f}" if "host_us" in sparse else "-", *megabytes,
        f"{fits['dense']}/{fits['hybrid']}/{fits['sparse']}",
    ]  # fmt: skip


def _describe(record: Record) -> str:
    parts = [
        f"{n} {r['device_ms']:.4f} ms" if "device_ms" in r else f"{n}: {r['error']}"
        for n, r in record["results"].items()
    ]
    return ", ".join(parts)


def _cases(args: argparse.Namespace) -> Iterator[DecodeCase]:
    for kv_heads in args.kv:
        schedules = (False,) if kv_heads == args.heads else tuple(s == "grouped" for s in args.schedules)
        for mask in args.masks:
            for grouped in schedules:
                for length in args.lengths:
                    case = parse_case(f"{mask}-{length}-h{args.heads}-kv{kv_heads}-d{args.dim}")
                    for batch in args.batches:
                        yield DecodeCase(case, batch, grouped)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m s2train.kernels.benchmarks.decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--masks", nargs="+", default=MASKS, help="blocks, window and stride: b128-l8-v16")
    parser.add_argument("--lengths", nargs="+", default=LENGTHS, help="tokens: 8k 32k 128k")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv", nargs="+", type=int, default=[8, 32], help="KV heads")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--schedules", nargs="+", choices=("shifted", "grouped"), default=["shifted", "grouped"])
    parser.add_argument("--splits", type=int, default=None, help="parts of the keys; default: the op's own choice")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dense-every", type=int, default=4, help="of the hybrid whose largest batch is reported")
    parser.add_argument("--memory-gb", type=float, default=80.0)
    parser.add_argument("--weights-gb", type=float, default=14.5, help="7.25B parameters in bfloat16")
    parser.add_argument("--seconds", type=float, default=500, help="start nothing new after this time")
    add_device(parser)
    add_output(parser, "decode")
    args = parser.parse_args(arguments)
    if min(*args.batches, *args.kv, args.heads, args.layers, args.dense_every) < 1:
        parser.error("batches, heads and layers must be at least 1")
    try:
        list(_cases(args))
    except ValueError as error:
        parser.error(str(error))
    check_output(parser, args)
    check_device(parser, args)
    return args


if __name__ == "__main__":
    sys.exit(main())
