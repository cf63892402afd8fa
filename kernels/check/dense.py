"""Check and time dense layers' kernels on this GPU.

`python -m s2train.kernels.check.dense OUTPUT.json` compares every implementation of dense causal attention with a
float64 oracle in each type of call that a model makes (whole sequences, later queries, packed documents; grouped heads
or not; deterministic or not), then times the correct ones. `kernels/verified.py` may list what the file reports as
right.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ..attention import block_sparse_attention
from ..benchmarks.program import write_results
from ..benchmarks.timing import Clock, time_passes
from ..dense import dense_causal_attention
from ..dense_choice import IMPLEMENTATIONS, DenseCall, Kind
from ..flash4 import PACKAGE, fa4_attention
from ..layout import BlockLayout
from ..layout_builder import ColumnRule
from ..provenance import origin
from ..reference import reference_attention
from ..versions import installed_version
from ..workers import run_tasks, serve

_SECONDS = 60  # per case, including compilation
_BLOCK = 128
_NAMES = ("out", "dq", "dk", "dv")
_FLOOR = 3e-7  # relative error that is always accepted
_DOCUMENTS = (37, 0, 700, 1, 333, 29)


@dataclass(frozen=True)
class DenseCase:
    """One type of call by one implementation.

    `length` counts the keys; the last `queries` of them have queries.
    """

    implementation: str
    kind: Kind
    dtype: str = "bfloat16"
    dim: int = 128
    heads: int = 8
    kv_heads: int = 2
    deterministic: bool = False
    length: int = 1100
    queries: int = 1100
    batch: int = 1
    documents: tuple[int, ...] = ()

    @property
    def call(self) -> DenseCall:
        grouped = self.heads != self.kv_heads
        dtype = getattr(torch, self.dtype)
        return DenseCall(self.kind, dtype, self.dim, grouped, self.deterministic, None, self.length)

    @property
    def name(self) -> str:
        return f"{self.implementation}: {self.call.name}"


def _check_cases() -> list[DenseCase]:
    found = []
    shapes = [("bfloat16", 128), ("bfloat16", 64), ("float16", 128)]
    kinds: tuple[Kind, ...] = ("whole", "later", "documents")
    for kind, (dtype, dim), kv_heads, deterministic in product(kinds, shapes, (2, 8), (False, True)):
        if dtype == "float16" and (kv_heads == 8 or deterministic):
            continue
        queries, batch = {"whole": (1100, 2), "later": (300, 2), "documents": (1100, 1)}[kind]
        documents = _DOCUMENTS if kind == "documents" else ()
        for implementation in IMPLEMENTATIONS:
            if kind != "whole" and implementation in ("cudnn", "efficient"):
                continue
            if (kind == "documents" and implementation == "flash") or (deterministic and implementation == "cudnn"):
                continue
            found.append(
                DenseCase(implementation, kind, dtype, dim, 8, kv_heads, deterministic, 1100, queries, batch, documents)
            )
    return sorted(found, key=lambda case: case.implementation != "fa4")  # start with the longest compilation


def _timings() -> list[list[DenseCase]]:
    """Return groups of cases that differ only in implementation.

    The most informative come first.
    """
    k = 1024

    def group(kind: Kind, length: int, kv_heads: int, names: str, **options: Any) -> list[DenseCase]:
        sizes = {"heads": 32, "kv_heads": kv_heads, "length": length, "queries": length} | options
        return [DenseCase(name, kind, **sizes) for name in names.split()]

    uneven = tuple(32 * k // 64 * n for n in (1, 2, 3, 5, 8, 13, 9, 7, 6, 4, 3, 2, 1))
    return [
        group("whole", 32 * k, 32, "fa4 cudnn s2train flash"),
        group("whole", 32 * k, 8, "fa4 cudnn s2train flash", dim=64),
        group("whole", 8 * k, 32, "fa4 cudnn s2train flash"),
        group("whole", 32 * k, 8, "fa4 cudnn s2train flash"),
        group("later", 32 * k, 8, "fa4 s2train flash", queries=8 * k),
        group("documents", 32 * k, 8, "fa4 s2train", documents=uneven),
        group("whole", 32 * k, 8, "fa4 s2train flash", deterministic=True),
        group("documents", 32 * k, 8, "fa4 s2train", documents=uneven, deterministic=True),
        group("whole", 2 * k, 8, "fa4 cudnn s2train flash"),
        group("whole", 128 * k, 32, "fa4 cudnn s2train"),
    ]


def full_layout(case: DenseCase, device: torch.device) -> BlockLayout:
    """Return a layout that keeps everything."""
    blocks = -(-case.length // _BLOCK)
    rule = ColumnRule(1, lambda key: torch.ones_like(key, dtype=torch.bool))
    return BlockLayout.from_rule([rule], [0] * case.heads, _BLOCK, blocks, blocks, device=device)


def bounds_of(case: DenseCase, device: torch.device) -> Tensor | None:
    """Return document bounds, int32 [documents + 1]; None without documents."""
    if not case.documents:
        return None
    return torch.tensor((0, *case.documents), device=device).cumsum(0).to(torch.int32)


def make_inputs(case: DenseCase, device: torch.device) -> list[Tensor]:
    """Make random q, k, v and the output's gradient.

    Tensors are in the layer's format [s, b, h, d]; v is a slice of a projection.
    """
    dtype = getattr(torch, case.dtype)

    def random(rows: int, heads: int, width: int) -> Tensor:
        return torch.randn(rows, case.batch, heads, width, device=device).to(dtype)

    projected = random(case.length, case.kv_heads, 3 * case.dim)
    inputs = [random(case.queries, case.heads, case.dim), random(case.length, case.kv_heads, case.dim)]
    return [*inputs, projected[..., 2 * case.dim :], random(case.queries, case.heads, case.dim)]


def attention(case: DenseCase, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the case's implementation as a function of q, k and v."""
    bounds, scale, offset = bounds_of(case, device), case.dim**-0.5, case.length - case.queries
    if case.implementation == "s2train":
        layout = full_layout(case, device)
        return lambda q, k, v: block_sparse_attention(
            q, k, v, layout, softmax_scale=scale, query_offset=offset, cu_seqlens=bounds
        )
    if bounds is not None:
        return lambda q, k, v: fa4_attention(
            q, k, v, softmax_scale=scale, bounds=bounds, deterministic=case.deterministic
        )
    return lambda q, k, v: dense_causal_attention(
        q, k, v, softmax_scale=scale, query_offset=offset, implementation=case.implementation
    )


def check_case(case: DenseCase) -> dict[str, Any]:
    """Compute errors against float64, and whether two runs are equal.

    Also reports the errors of plain torch in the case's dtype.
    """
    device = torch.device("cuda")
    *inputs, dout = make_inputs(case, device)
    layout, bounds = full_layout(case, device), bounds_of(case, device)
    attend = attention(case, device)

    def results(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        # a view of its projection, so that strides are the layer's
        leaves = [x.detach() if x.dtype == dtype else x.detach().to(dtype) for x in inputs]
        leaves = [x.requires_grad_() for x in leaves]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        offset = case.length - case.queries
        return reference_attention(
            q, k, v, layout, softmax_scale=case.dim**-0.5, query_offset=offset, cu_seqlens=bounds
        )[0]

    exact, plain = results(reference, torch.float64), results(reference, dout.dtype)
    with _deterministic(case.deterministic):
        measured, again = results(attend, dout.dtype), results(attend, dout.dtype)
    row: dict[str, Any] = {"ok": True}
    for name, x, x_plain, x64 in zip(_NAMES, measured, plain, exact, strict=True):
        error, allowed = (_relative(y, x64) for y in (x, x_plain))
        row[name] = (error, 2 * allowed + _FLOOR)
        row["ok"] &= error <= row[name][1]  # false for NaN too
    if case.deterministic:
        row["same bits"] = all(x.equal(y) for x, y in zip(measured, again, strict=True)) and _same_bits(case)
        row["ok"] &= row["same bits"]
    return row


def _same_bits(case: DenseCase) -> bool:
    """Return whether four runs give the same gradients.

    The call is large enough to fill the GPU.
    """
    large = DenseCase(**asdict(case) | {"heads": 32, "kv_heads": 8 if case.call.grouped else 32, "batch": 1,
                      "length": 4096, "queries": 4096 if case.kind != "later" else 1024,
                      "documents": (1000, 96, 3000) if case.documents else ()})  # fmt: skip
    device = torch.device("cuda")
    *inputs, dout = make_inputs(large, device)
    leaves, attend = [x.detach().requires_grad_() for x in inputs], attention(large, device)
    with _deterministic(True):
        runs = [torch.autograd.grad(attend(*leaves), leaves, dout) for _ in range(4)]
    return all(x.equal(y) for run in runs[1:] for x, y in zip(run, runs[0], strict=True))


def time_group(cases: list[DenseCase], clock: Clock) -> list[dict[str, Any]]:
    """Time each implementation in ms, and compare results with the first."""
    device, rows = torch.device("cuda"), []
    *inputs, dout = make_inputs(cases[0], device)
    leaves = [x.detach().requires_grad_() for x in inputs]
    first: list[Tensor] | None = None
    for case in cases:
        row: dict[str, Any] = {
            "case": case.name,
            "length": case.length,
            "queries": case.queries,
            "heads": [case.heads, case.kv_heads, case.dim],
            "documents": len(case.documents),
        }
        try:
            with _deterministic(case.deterministic):
                attend = attention(case, device)
                out = attend(*leaves)
                found = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
                del out
                first = found if first is None else first
                row["from first"] = [_relative(x, y) for x, y in zip(found, first, strict=True)]
                backward = partial(torch.autograd.grad, inputs=leaves, grad_outputs=dout)
                row |= time_passes(partial(attend, *leaves), backward, clock, budget_ms=600)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
        torch.cuda.empty_cache()
    return rows


def _relative(x: Tensor, y: Tensor) -> float:
    """Compute the norm of the difference over the norm.

    Computes in pieces, so that float64 copies are small.
    """
    pieces = [
        ((a.double() - b.double()).square().sum(), b.double().square().sum()) for a, b in zip(x, y, strict=True)
    ] if len(x) <= 2048 else [((x.float() - y.float()).square().sum(), y.float().square().sum())]  # fmt: skip
    difference, norm = (torch.stack(parts).sum().sqrt() for parts in zip(*pieces, strict=True))
    return (difference / norm.clamp(min=1e-30)).item()


def _deterministic(asked: bool) -> AbstractContextManager[None]:
    return _Deterministic() if asked else nullcontext()


class _Deterministic(AbstractContextManager[None]):
    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


def _answer(task: dict[str, Any]) -> dict[str, Any]:
    return check_case(DenseCase(**task | {"documents": tuple(task["documents"])}))


def main() -> int:
    """Run the command line; return 1 if a case is wrong."""
    parser = argparse.ArgumentParser(prog="python -m s2train.kernels.check.dense", description=__doc__)
    parser.add_argument("output", type=Path, nargs="?", help="JSON to write")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="cases checked at a time")
    parser.add_argument("--seconds", type=float, default=90, help="start no timing after this time")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(_answer)
        return 0
    if args.output is None or args.output.exists() or not torch.cuda.is_available():
        parser.error("name an OUTPUT.json that is not there yet, on a machine with a CUDA device")
    began = time.monotonic()
    data: dict[str, Any] = {
        **origin("kernels.check.dense"),
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, PACKAGE: installed_version(PACKAGE)},
        "checks": [],
        "times": [],
    }
    cases = _check_cases()
    tasks = [asdict(case) for case in cases]
    command = ["-m", "s2train.kernels.check.dense", "--worker"]
    for case, row in zip(cases, run_tasks(command, tasks, args.jobs, _SECONDS), strict=True):
        data["checks"].append({"case": case.name, **row})
        print("ok   " if row["ok"] else "WRONG", case.name, row.get("error", ""), flush=True)
    _save(args.output, data, began)
    clock = Clock(torch.device("cuda"))
    for group in _timings():
        if time.monotonic() - began > args.seconds:
            data["not timed"] = [*data.get("not timed", []), group[0].name]
            continue
        for row in time_group(group, clock):
            data["times"].append(row)
            times = row.get("ms", {})
            print(
                row["case"], row["length"], {k: round(v, 3) for k, v in times.items()}, row.get("error", ""), flush=True
            )
        _save(args.output, data, began)
    wrong = [row["case"] for row in data["checks"] if not row["ok"]]
    print(f"{len(data['checks']) - len(wrong)} right, {len(wrong)} wrong in {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


def _save(path: Path, data: dict[str, Any], began: float) -> None:
    data["seconds"] = time.monotonic() - began
    write_results(data, path)


if __name__ == "__main__":
    sys.exit(main())
