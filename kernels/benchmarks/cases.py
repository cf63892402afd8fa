"""Benchmark cases: block mask, length and heads in one word.

For example `b128-l8-v16-32k-kv8`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..layout import BLOCK_SIZES, BlockLayout
from ..layout_builder import ColumnRule

_UNITS = {"": 1, "k": 1024, "m": 1024**2}
_WORD = re.compile(r"b(\d+)-l(\d+)-v(\d+)-(\d+)([km]?)(?:-h(\d+))?(?:-kv(\d+))?(?:-d(\d+))?")


@dataclass(frozen=True)
class Case:
    """A local window and every `stride`-th key block, shifted by head.

    Causal, batch 1; the window has `local` blocks.
    """

    block: int
    local: int
    stride: int
    length: int
    heads: int = 32
    kv_heads: int = 32
    dim: int = 128

    def __post_init__(self) -> None:
        if self.block not in BLOCK_SIZES:
            raise ValueError(f"{self.name}: blocks have {BLOCK_SIZES} tokens, not {self.block}")
        if min(getattr(self, field.name) for field in fields(self)) < 1:
            raise ValueError(f"{self.name}: every number must be at least 1")
        if self.length % self.block or self.heads % self.kv_heads:
            raise ValueError(f"{self.name}: the length must be a multiple of the block, the heads of the KV heads")

    @property
    def name(self) -> str:
        word = f"{self.mask_name}-{tokens(self.length)}"
        word += f"-h{self.heads}" if self.heads != 32 else ""
        word += f"-kv{self.kv_heads}" if self.kv_heads != self.heads else ""
        return word + (f"-d{self.dim}" if self.dim != 128 else "")

    @property
    def mask_name(self) -> str:
        return f"b{self.block}-l{self.local}-v{self.stride}"

    @property
    def num_patterns(self) -> int:
        return min(self.stride, self.heads)

    def keeps(self, head: int | Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return which pairs of positions (int64, broadcast) a head keeps, including causality."""
        i, j = query // self.block, key // self.block
        vertical = (j - head % self.num_patterns) % self.stride == 0
        return (query >= key) & ((i - j < self.local) | vertical)

    def layout(self, device: torch.device) -> BlockLayout:
        num_blocks = self.length // self.block

        def rule(pattern: int) -> ColumnRule:
            return ColumnRule(self.local, lambda key: (key - pattern) % self.stride == 0)

        return BlockLayout.from_rule(
            [rule(p) for p in range(self.num_patterns)],
            [h % self.num_patterns for h in range(self.heads)],
            self.block,
            num_blocks,
            num_blocks,
            device=device,
        )

    def kept_positions(self) -> int:
        """Count (query, key) pairs of all heads; diagonal blocks count by token."""
        n = self.length // self.block
        j = torch.arange(n, dtype=torch.int64)
        below = n - 1 - j  # query blocks after key block j
        kept = []
        for p in range(self.num_patterns):
            vertical = (j - p) % self.stride == 0
            kept.append(int(torch.where(vertical, below, below.clamp(max=self.local - 1)).sum()))
        in_diagonal = n * (self.block * (self.block + 1) // 2)
        return sum(kept[h % self.num_patterns] * self.block**2 + in_diagonal for h in range(self.heads))

    def density(self) -> float:
        """Return kept positions over causal positions."""
        return self.kept_positions() / (self.heads * (self.length * (self.length + 1) // 2))


def tokens(count: int) -> str:
    """Format 131072 as 128k."""
    for unit, size in (("m", 1024**2), ("k", 1024)):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


def parse_case(word: str) -> Case:
    """Parse a case's word.

    Its form is b<block>-l<local>-v<stride>-<length>[-h<heads>][-kv<KV heads>][-d<head dimension>].
    """
    match = _WORD.fullmatch(word)
    if match is None:
        raise ValueError(
            f"{word!r} is neither a group ({', '.join(GROUPS)}) nor a case such as b128-l8-v16-32k or "
            "b64-l16-v16-8k-h32-kv8-d64"
        )
    block, local, stride, length, unit, heads, kv_heads, dim = match.groups()
    num_heads = int(heads or 32)
    return Case(
        block=int(block),
        local=int(local),
        stride=int(stride),
        length=int(length) * _UNITS[unit],
        heads=num_heads,
        kv_heads=int(kv_heads or num_heads),
        dim=int(dim or 128),
    )


_LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128)  # k; 1k shows whether break-even is below 2k
GROUPS: dict[str, tuple[str, ...]] = {
    "quick": ("b128-l8-v16-2k", "b128-l8-v16-8k", "b128-l8-v16-32k", "b64-l16-v16-32k"),
    "targets": (
        "b128-l8-v16-32k", "b64-l16-v16-32k", "b128-l8-v16-32k-kv8", "b128-l8-v1-32k",
        "b128-l8-v16-2k", "b128-l8-v16-4k", "b128-l8-v16-8k", "b128-l8-v16-128k", "b64-l16-v16-128k",
    ),
    "lengths": tuple(f"b128-l8-v16-{n}k" for n in _LENGTHS),
    "density": tuple(f"b128-l{local}-v{stride}-32k" for local, stride in ((8, 2), (8, 4), (8, 8), (4, 32), (2, 64))),
    "b64": tuple(f"b64-l16-v16-{n}k" for n in _LENGTHS),
    "gqa": tuple(f"b128-l8-v16-{n}k-kv8" for n in _LENGTHS),
    "gqa64": tuple(f"b64-l16-v16-{n}k-kv8" for n in _LENGTHS),
    "long": ("b128-l8-v16-512k", "b64-l16-v16-512k", "b128-l8-v16-512k-kv8", "b128-l8-v16-1m-kv8", "b128-l8-v16-1m"),
}  # fmt: skip
DEFAULT = ("targets", "lengths", "density", "b64", "gqa", "gqa64", "long")  # the most important first


def parse_cases(words: Sequence[str]) -> list[Case]:
    """Parse names and groups into cases, in order and without duplicates."""
    cases: dict[Case, None] = {}
    for word in words:
        for name in GROUPS.get(word, (word,)):
            cases.setdefault(parse_case(name))
    return list(cases)
