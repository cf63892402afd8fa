"""One decoding step to measure, and its expected result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention import Backend
from ..decode.op import block_sparse_decode
from ..decode.pages import last_uses, read_tokens
from ..decode.reference import kept_blocks
from ..layout import BlockLayout
from ..layout_builder import ColumnRule
from .cases import Case

DTYPE = torch.bfloat16
_CHECKED_HEADS = 2  # KV heads of one sequence compared with float64
FUSED = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class DecodeCase:
    """A step of `batch` sequences of `case.length` tokens, including the newest.

    Attributes:
        grouped: heads of a KV group keep the same blocks; otherwise each head keeps different ones.
    """

    case: Case
    batch: int
    grouped: bool

    @property
    def name(self) -> str:
        return f"{self.case.name}{'-grouped' if self.grouped else ''} batch {self.batch}"

    @property
    def page_bytes(self) -> int:
        return 2 * self.case.block * self.case.dim * DTYPE.itemsize

    @property
    def dense_bytes(self) -> int:
        """Return KV bytes of one layer if every block is kept."""
        return self.batch * self.case.kv_heads * (self.case.length // self.case.block) * self.page_bytes

    def offset(self, head: int) -> int:
        number = head // (self.case.heads // self.case.kv_heads) if self.grouped else head
        return number % self.case.num_patterns

    def predicted_bytes(self) -> int:
        """Return KV bytes of one layer by the rule.

        The rule keeps the window, and before it the columns of each group.
        """
        case, group = self.case, self.case.heads // self.case.kv_heads
        num_blocks = case.length // case.block
        count = min(case.local, num_blocks) * case.kv_heads
        for kv in range(case.kv_heads):
            offsets = {self.offset(head) for head in range(kv * group, (kv + 1) * group)}
            count += sum(j % case.stride in offsets for j in range(num_blocks - min(case.local, num_blocks)))
        return self.batch * count * self.page_bytes

    def layout(self, device: torch.device) -> BlockLayout:
        """Build a layout with one more block, which keeps the newest needed."""
        case = self.case

        def rule(offset: int) -> ColumnRule:
            return ColumnRule(case.local, lambda key: (key - offset) % case.stride == 0)

        patterns = [rule(p) for p in range(case.num_patterns)]
        num_blocks = case.length // case.block + 1
        heads = [self.offset(head) for head in range(case.heads)]
        return BlockLayout.from_rule(patterns, heads, case.block, num_blocks, num_blocks, device=device)


class PagedStep:
    """The step over exactly the pages that `layout` needs (None: all).

    Pages are filled with random numbers.
    """

    def __init__(
        self,
        step: DecodeCase,
        layout: BlockLayout | None,
        backend: Backend,
        device: torch.device,
        num_splits: int | None = None,
    ) -> None:
        case = step.case
        self.layout, self.backend, self.num_splits = layout, backend, num_splits
        num_blocks = case.length // case.block
        newest = num_blocks - 1
        if layout is None:
            held = torch.ones(case.kv_heads, num_blocks, dtype=torch.bool)
        else:
            held = last_uses(layout, case.kv_heads)[:, :num_blocks] >= newest
        held = held.expand(step.batch, -1, -1)
        count = int(held.sum())
        table = torch.full(held.shape, -1, dtype=torch.int32)
        table[held] = torch.randperm(count).int()  # as after many allocations: adjacent blocks are far apart
        self.table = table.to(device)
        self.keys, self.values = (
            torch.empty(count + 1, case.block, case.dim, dtype=DTYPE, device=device).normal_() for _ in range(2)
        )
        self.query = torch.randn(step.batch, case.heads, case.dim, device=device).to(DTYPE)
        self.positions = torch.full((step.batch,), case.length - 1, dtype=torch.int32, device=device)
        self.bytes_in_use = (self.keys.numel() + self.values.numel()) * DTYPE.itemsize - step.page_bytes
        self.length = case.length

    def __call__(self) -> Tensor:
        out, _ = block_sparse_decode(
            self.query,
            self.keys,
            self.values,
            self.table,
            self.positions,
            self.layout,
            num_splits=self.num_splits,
            backend=self.backend,
        )
        return out

    def tokens(self, sequence: int, kv: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [length, d] of one head."""
        table = self.table[sequence : sequence + 1, kv : kv + 1]
        keys, values = (read_tokens(pages, table, self.length)[0, 0] for pages in (self.keys, self.values))
        return keys, values

    def seen(self, head: int) -> Tensor:
        """Return the keys that a query head sees, bool [length]."""
        key = torch.arange(self.length, device=self.query.device)
        if self.layout is None:
            return torch.ones_like(key, dtype=torch.bool)
        block = self.layout.block_size
        return kept_blocks(self.layout, (self.length - 1) // block)[head, key // block]


class ContiguousStep:
    """The step with torch's fused attention over contiguous keys and values."""

    def __init__(self, step: DecodeCase, kernel: str, device: torch.device) -> None:
        case = step.case
        shape = (step.batch, case.kv_heads, case.length, case.dim)
        self.kernel, self.length = FUSED[kernel], case.length
        self.keys, self.values = (torch.empty(shape, dtype=DTYPE, device=device).normal_() for _ in range(2))
        self.query = torch.randn(step.batch, case.heads, case.dim, device=device).to(DTYPE)

    def __call__(self) -> Tensor:
        grouped = self.query.shape[1] != self.keys.shape[1]
        with sdpa_kernel(self.kernel):
            out = F.scaled_dot_product_attention(self.query[:, :, None], self.keys, self.values, enable_gqa=grouped)
        return out[:, :, 0]

    def tokens(self, sequence: int, kv: int) -> tuple[Tensor, Tensor]:
        return self.keys[sequence, kv], self.values[sequence, kv]

    @cached_property
    def _all(self) -> Tensor:
        return torch.ones(self.length, dtype=torch.bool, device=self.query.device)

    def seen(self, head: int) -> Tensor:
        return self._all


def errors(step: PagedStep | ContiguousStep, kv_heads: int) -> tuple[float, float]:
    """Compute relative errors against float64: ours, and plain torch's in bfloat16.

    Compares the heads of one random sequence.
    """
    out = step()
    sequence = int(torch.randint(out.shape[0], ()))
    group = out.shape[1] // kv_heads
    squares = torch.zeros(3, dtype=torch.float64)
    for kv in torch.randperm(kv_heads)[:_CHECKED_HEADS].tolist():
        keys, values = step.tokens(sequence, kv)
        for head in range(kv * group, (kv + 1) * group):
            seen, query = step.seen(head), step.query[sequence, head]
            exact = _attend(query.double(), keys[seen].double(), values[seen].double())
            plain = _attend(query, keys[seen], values[seen]).double()
            parts = (out[sequence, head].double() - exact, plain - exact, exact)
            squares += torch.stack([x.square().sum() for x in parts]).cpu()
    error, allowed, scale = squares.sqrt().tolist()
    return error / scale, allowed / scale


def _attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scores = (keys @ query) * (1 / math.sqrt(len(query)))
    return scores.softmax(0) @ values
