"""Compare top-k lists with the static layout of the same mask.

Measures their time and the cost of building them. A case is a word such as b128-k16-32k-kv8: blocks of 128, 16 key
blocks per query block (its own, the one before, the first, others at random), 32k tokens, one list for each of 8 KV
heads (and -h for heads, -d for their dimension).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ..attention import block_sparse_attention
from ..dispatch import kernels_in_use
from ..layout import BLOCK_SIZES, BlockLayout
from ..relative_error import largest, relative_error
from ..topk_layout import Layout, TopKLayout
from .cases import tokens
from .run import failures
from .timing import Clock, launch_costs, time_passes

Record = dict[str, Any]
_WORD = re.compile(r"b(\d+)-k(\d+)-(\d+)(k?)(?:-h(\d+))?(?:-kv(\d+))?(?:-d(\d+))?")
RUN_TIME = ("b128-k16-32k-kv8", "b128-k16-32k", "b64-k32-32k-kv8", "b128-k16-8k-kv8", "b128-k16-128k-kv8")
_PARTS = ("forward", "backward", "both")
_DIFFERENCE = 1e-2  # allowed relative difference between two bfloat16 results of one mask


@dataclass(frozen=True)
class RunTimeCase:
    """`slots` key blocks for every query block of every KV head.

    Causal, batch 1, bfloat16.
    """

    block: int
    slots: int
    length: int
    heads: int = 32
    kv_heads: int = 32
    dim: int = 128

    def __post_init__(self) -> None:
        if self.block not in BLOCK_SIZES or self.length % self.block or self.heads % self.kv_heads:
            raise ValueError(
                f"{self.name}: blocks have {BLOCK_SIZES} tokens, the length is a multiple of the block, the heads of "
                "the KV heads"
            )
        if not 3 <= self.slots <= self.length // self.block:
            raise ValueError(f"{self.name}: 3 to {self.length // self.block} key blocks can be kept")

    @property
    def name(self) -> str:
        word = f"b{self.block}-k{self.slots}-{tokens(self.length)}"
        word += f"-h{self.heads}" if self.heads != 32 else ""
        word += f"-kv{self.kv_heads}" if self.kv_heads != self.heads else ""
        return word + (f"-d{self.dim}" if self.dim != 128 else "")

    def indices(self, device: torch.device) -> Tensor:
        """Draw indices, int32 [1, KV heads, query blocks, slots].

        They are the own, previous and first block, then others drawn from earlier ones.
        """
        n = self.length // self.block
        block = torch.arange(n, device=device)
        scores = torch.rand(1, self.kv_heads, n, n, device=device)
        scores[..., 0] = 2
        scores += 2 * (block >= block[:, None] - 1)
        scores = scores.masked_fill(block > block[:, None], -1)
        best = scores.topk(self.slots)
        return torch.where(best.values < 0, -1, best.indices).to(torch.int32)


def split_words(words: Sequence[str]) -> tuple[list[RunTimeCase], list[str]]:
    """Split words into cases of top-k lists, without duplicates, and other words.

    The group run-time stands for cases of top-k lists, too.
    """
    cases: dict[RunTimeCase, None] = {}
    others = []
    for word in words:
        for name in RUN_TIME if word == "run-time" else (word,):
            match = _WORD.fullmatch(name)
            if match is None:
                others.append(name)
            else:
                cases[_parse(match)] = None
    return list(cases), others


def _parse(match: re.Match[str]) -> RunTimeCase:
    block, slots, length, unit, heads, kv_heads, dim = match.groups()
    num_heads = int(heads or 32)
    return RunTimeCase(
        block=int(block),
        slots=int(slots),
        length=int(length) * (1024 if unit else 1),
        heads=num_heads,
        kv_heads=int(kv_heads or num_heads),
        dim=int(dim or 128),
    )


def measure(case: RunTimeCase, clock: Clock, device: torch.device, budget_ms: float) -> Record:
    """Measure a case; if it fails, the reason is under "error"."""
    record: Record = {}
    with failures() as failed:
        record = _measure(case, clock, device, budget_ms)
    return {"case": case.name, "error": failed[0]} if failed else record


def _measure(case: RunTimeCase, clock: Clock, device: torch.device, budget_ms: float) -> Record:
    """Time the static layout, prebuilt lists, and lists built every pass.

    "over_static" are the times of the last two over the first; "build" is the cost of building alone; "differences" are
    the results' differences from the static layout's. "error" is present if these are too large.
    """
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    q, dout = (make(case.length, 1, case.heads, case.dim) for _ in range(2))
    k, v = (make(case.length, 1, case.kv_heads, case.dim) for _ in range(2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    indices = case.indices(device)

    def lists() -> TopKLayout:
        return TopKLayout.from_indices(indices, case.block, num_heads=case.heads)

    built = lists()
    group = case.heads // case.kv_heads
    patterns = built.mask()[0, ::group]
    static = BlockLayout.from_patterns(patterns, [h // group for h in range(case.heads)], case.block)

    def forward(layout: Callable[[], Layout]) -> Tensor:
        return block_sparse_attention(q, k, v, layout())

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, dout)

    layouts: dict[str, Callable[[], Layout]] = {"static": lambda: static, "built once": lambda: built, "built": lists}
    record: Record = {"case": case.name} | asdict(case) | {"kept_blocks": int(patterns.sum()), "results": {}}
    used = kernels_in_use(q, k, v, built)
    record["kernels"] = [used.forward, used.backward]
    found = []
    for layout in layouts.values():
        out = forward(layout)
        found.append((out.detach(), *backward(out)))
        del out
    names = ("out", "dq", "dk", "dv")
    record["differences"] = {
        name: largest(relative_error(x, static_x.float()) for x in xs)
        for name, static_x, *xs in zip(names, *found, strict=True)
    }
    del found
    if not all(x <= _DIFFERENCE for x in record["differences"].values()):
        record["error"] = f"differs from the static layout: {record['differences']}"
        return record
    for name, layout in layouts.items():
        record["results"][name] = time_passes(partial(forward, layout), backward, clock, budget_ms)
    base = record["results"]["static"]["ms"]
    record["over_static"] = {
        name: {part: record["results"][name]["ms"][part] / base[part] for part in _PARTS}
        for name in ("built once", "built")
    }
    record["build"] = launch_costs(partial(_build, lists, case), clock)
    return record


def _build(lists: Callable[[], TopKLayout], case: RunTimeCase) -> None:
    """Build a case's forward and backward schedules, and check the indices."""
    layout = lists()
    layout.check_values()
    if layout.device.type == "cuda" and case.block >= 64:
        from ..hopper.topk_backward_schedule import topk_backward_schedule
        from ..hopper.topk_forward_schedule import topk_forward_schedule

        topk_forward_schedule(layout, causal=True, s_k=case.length)
        topk_backward_schedule(layout, case.kv_heads, case.length, case.length, 0, True)
    else:
        assert layout.row_columns.numel() == layout.column_rows.numel()
        layout.columns_by_work(case.kv_heads)


def run_time_table(records: list[Record]) -> Table:
    """Tabulate static ms, the others' times over it, and build times."""
    table = Table(title="top-k lists: time over the static layout's with the same mask", title_justify="left", box=None)
    table.add_column("", no_wrap=True)
    headings = ("kernels", "static ms", "built once", "built in every pass", "build: device us", "alone us", "host us")
    for heading in headings:
        table.add_column(heading, justify="right")
    for record in records:
        if "error" in record:
            table.add_row(record["case"], record["error"])
            continue
        over = record["over_static"]
        ratios = [" / ".join(f"{over[name][part]:.3f}" for part in _PARTS) for name in ("built once", "built")]
        static = " / ".join(f"{record['results']['static']['ms'][part]:.3f}" for part in _PARTS)
        build = record["build"]
        times = [f"{1e3 * build['device_ms']:.0f}", f"{1e3 * build['eager_ms']:.0f}", f"{build['host_us']:.0f}"]
        table.add_row(record["case"], " / ".join(record["kernels"]), static, *ratios, *times)
    table.caption = "forward / backward / both"
    return table
