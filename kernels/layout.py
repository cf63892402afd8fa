"""Which (query block, key block) pairs every head keeps, in the form that the kernels walk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .handles import register
from .layout_builder import MaskRule, Rule, column_lines, compress, row_lines

BLOCK_SIZES = (16, 32, 64, 128, 256)
# of each head; or of each sequence's heads
Patterns = Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Kept block pairs of every head, in global block coordinates.

    Query block i covers positions [i*B, (i+1)*B) and key block j the same for keys. Heads with equal masks
    share one pattern's storage. Build it with `from_mask`, `from_patterns` or `from_rule`; the host waits for the
    device meanwhile. `TopKLayout` is for masks that change with every step. Tensors are int32 on one device:

    - ``pattern_of_head`` [1 or batch, H]: which of the P patterns a head has, in every sequence or in each of a batch.
    - ``row_offsets`` [P*n_q + 1], ``row_columns`` [kept]: CSR; query block i of pattern p keeps key blocks
      ``row_columns[row_offsets[p*n_q + i] : row_offsets[p*n_q + i + 1]]``, ascending.
    - ``column_offsets`` [P*n_k + 1], ``column_rows`` [kept]: CSC; the query blocks that keep a key block,
      ascending.
    """

    block_size: int
    num_heads: int
    num_query_blocks: int
    num_key_blocks: int
    pattern_of_head: Tensor
    row_offsets: Tensor
    row_columns: Tensor
    column_offsets: Tensor
    column_rows: Tensor
    # what backends derive from the layout once (token masks, work order); never part of its meaning
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)
    # names this object in compiled graphs, which hold numbers only
    handle: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "handle", register(self))

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy is another object: with a handle and a cache of its own
        sizes = (self.block_size, self.num_heads, self.num_query_blocks, self.num_key_blocks)
        return BlockLayout, (*sizes, *self._tensors().values())

    @classmethod
    def from_mask(cls, mask: Tensor, block_size: int, *, device: torch.device | str | None = None) -> BlockLayout:
        """Layout of a bool mask [H, n_q, n_k], or [batch, H, n_q, n_k] (True: kept); equal heads are stored once.

        Raises ValueError for a mask of another dtype or rank, or an unsupported block size.
        """
        masks = mask.flatten(0, 1) if mask.dim() == 4 else mask
        _check_mask(masks, block_size)
        first: dict[bytes, int] = {}
        pattern_of_head: list[int] = []
        distinct: list[int] = []
        for head, content in enumerate(masks.cpu().numpy()):
            key = hashlib.blake2b(content.tobytes()).digest()
            if key not in first:
                first[key] = len(distinct)
                distinct.append(head)
            pattern_of_head.append(first[key])
        heads = mask.shape[-3]
        by_sequence = [pattern_of_head[at : at + heads] for at in range(0, len(pattern_of_head), heads)]
        return cls.from_patterns(masks[distinct], by_sequence, block_size, device=device)

    @classmethod
    def from_patterns(
        cls,
        masks_of_distinct: Tensor,
        pattern_of_head: Patterns,
        block_size: int,
        *,
        device: torch.device | str | None = None,
    ) -> BlockLayout:
        """Layout of P patterns, bool [P, n_q, n_k]; head h has pattern ``pattern_of_head[h]``.

        With a batch axis, head h of sequence b has pattern ``pattern_of_head[b][h]``. The tensors lie on `device`, by
        default the masks'. Raises ValueError as `from_mask` does, and for pattern indices outside [0, P).
        """
        masks = masks_of_distinct
        _check_mask(masks, block_size)
        _, num_query_blocks, num_key_blocks = masks.shape
        layout = cls.from_rule(
            [MaskRule(mask) for mask in masks],
            pattern_of_head,
            block_size,
            num_query_blocks,
            num_key_blocks,
            device=masks.device,
        )
        return layout if device is None else layout.to(device)

    @classmethod
    def from_rule(
        cls,
        rules: Sequence[Rule],
        pattern_of_head: Patterns,
        block_size: int,
        num_query_blocks: int,
        num_key_blocks: int,
        *,
        device: torch.device | str,
    ) -> BlockLayout:
        """Layout of P rules, built on `device` without their masks; head h has rule ``pattern_of_head[h]``.

        With a batch axis, head h of sequence b has rule ``pattern_of_head[b][h]``.

        A rule takes int64 block indices (query, key) on `device` that broadcast, several times, in pieces of rows
        and of columns, and returns a bool of the shape that they broadcast to. Beside the layout, building takes
        at most 40 MB however long the sequence, if rules take at most 16 bytes a pair. Of a `ColumnRule` no pair is
        looked at one by one: the time goes with what it keeps.

        Raises ValueError for an unsupported block size, no rules or blocks, pattern indices outside [0, P), a
        rule that returns something else or changes its mind, and for more kept blocks than 32 bits can number.
        """
        check_block_size(block_size)
        if min(len(rules), num_query_blocks, num_key_blocks) < 1:
            raise ValueError(
                f"at least one rule and block is needed, got {len(rules)} rules, {num_query_blocks} query blocks "
                f"and {num_key_blocks} key blocks"
            )
        by_sequence = _by_sequence(pattern_of_head, len(rules))
        sizes = (num_query_blocks, num_key_blocks, torch.device(device))
        row_offsets, row_columns = compress(lambda pattern: row_lines(rules[pattern], *sizes), len(rules))
        column_offsets, column_rows = compress(lambda pattern: column_lines(rules[pattern], *sizes), len(rules))
        if len(row_columns) != len(column_rows):
            raise ValueError("a rule must keep the same pairs by rows and by columns: it may use its arguments only")
        return cls(
            block_size=block_size,
            num_heads=len(by_sequence[0]),
            num_query_blocks=num_query_blocks,
            num_key_blocks=num_key_blocks,
            pattern_of_head=torch.tensor(by_sequence, dtype=torch.int32, device=row_offsets.device),
            row_offsets=row_offsets,
            row_columns=row_columns,
            column_offsets=column_offsets,
            column_rows=column_rows,
        )

    @property
    def device(self) -> torch.device:
        return self.row_offsets.device

    @property
    def batch_size(self) -> int:
        """Sequences that have patterns of their own; 1 if all have the same."""
        return self.pattern_of_head.shape[0]

    @property
    def compiled(self) -> dict[Any, Any]:
        """Kernels that were compiled for this layout's device."""
        return self.cache

    @property
    def nbytes(self) -> int:
        """Bytes of the index tensors (slices by `heads` share them)."""
        return sum(t.nbytes for t in self._tensors().values())

    @property
    def kept_blocks_of_heads(self) -> int:
        """About the number of kept pairs over all heads, patterns used alike: what the host knows without asking."""
        num_patterns = (self.row_offsets.numel() - 1) // self.num_query_blocks
        return self.row_columns.numel() * -(-self.pattern_of_head.numel() // num_patterns)

    def patterns_of_heads(self, purpose: str) -> Tensor:
        """Int32 [H]: the heads' patterns in every sequence; ValueError if sequences of a batch differ.

        Args:
            purpose: what needs one layout for the whole batch, for the error.
        """
        if self.batch_size != 1:
            raise ValueError(
                f"{purpose} takes one layout for all sequences, this one has {self.batch_size}: build a layout without "
                "a batch axis"
            )
        return self.pattern_of_head[0]

    def mask(self) -> Tensor:
        """Bool [H, n_q, n_k], True where kept; [batch, H, n_q, n_k] if sequences of a batch differ."""
        num_rows = self.row_offsets.numel() - 1
        counts = self.row_offsets.diff().long()
        rows = torch.repeat_interleave(torch.arange(num_rows, device=self.device), counts)
        flat = torch.zeros(num_rows, self.num_key_blocks, dtype=torch.bool, device=self.device)
        flat[rows, self.row_columns.long()] = True
        patterns = flat.view(-1, self.num_query_blocks, self.num_key_blocks)
        return patterns[self.pattern_of_head.long().squeeze(0)]

    def heads(self, start: int, stop: int) -> BlockLayout:
        """The layout of heads [start, stop), such as one tensor-parallel rank's; shares the index tensors."""
        if not 0 <= start < stop <= self.num_heads:
            raise ValueError(f"heads({start}, {stop}): the layout has heads 0 to {self.num_heads}")
        if (start, stop) == (0, self.num_heads):
            return self
        return self._with(num_heads=stop - start, pattern_of_head=self.pattern_of_head[:, start:stop].contiguous())

    def to(self, device: torch.device | str) -> BlockLayout:
        """This layout with its tensors on `device`; itself if they are there already."""
        moved = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        if moved["row_offsets"] is self.row_offsets:
            return self
        return self._with(**moved)

    def columns_by_work(self, num_kv_heads: int) -> Tensor:
        """As the function `columns_by_work`, kept in the cache."""
        key = ("columns_by_work", num_kv_heads)
        if key not in self.cache:
            self.cache[key] = columns_by_work(
                self.column_offsets, self.pattern_of_head, num_kv_heads, self.num_key_blocks
            )
        return self.cache[key]

    def _tensors(self) -> dict[str, Tensor]:
        names = ("pattern_of_head", "row_offsets", "row_columns", "column_offsets", "column_rows")
        return {name: getattr(self, name) for name in names}

    def _with(self, **changes: Any) -> BlockLayout:
        sizes = ("block_size", "num_heads", "num_query_blocks", "num_key_blocks")
        return BlockLayout(**({name: getattr(self, name) for name in sizes} | self._tensors() | changes))


def columns_by_work(column_offsets: Tensor, pattern_of_head: Tensor, num_kv_heads: int, num_key_blocks: int) -> Tensor:
    """Key blocks of all KV heads, most read first: int32 [batch * H_kv * n_k].

    Key block j of KV head h in sequence b is number ``(b * H_kv + h) * n_k + j``; b is 0 if all sequences have the same
    patterns. Programs that start with the longest columns finish together.

    Args:
        column_offsets: int32 [P * n_k + 1], as in `BlockLayout`.
        pattern_of_head: int32 [1 or batch, H].
    """
    counts = column_offsets.diff().view(-1, num_key_blocks)[pattern_of_head.long()]
    work = counts.view(len(pattern_of_head) * num_kv_heads, -1, num_key_blocks).sum(1).flatten()
    return work.argsort(descending=True, stable=True).to(torch.int32)


def _by_sequence(pattern_of_head: Patterns, num_patterns: int) -> list[list[int]]:
    """Patterns [1 or batch][H]; ValueError unless they are some of `num_patterns`, for equally many heads."""
    alone = [int(p) for p in pattern_of_head if isinstance(p, Integral)]  # numpy's integers too
    of_sequences = [list(map(int, heads)) for heads in pattern_of_head if not isinstance(heads, int | Integral)]
    found = [alone] if alone else of_sequences
    if alone and of_sequences:
        raise ValueError(f"pattern_of_head mixes patterns with lists of patterns: {list(pattern_of_head)}")
    counts = {len(heads) for heads in found}
    if counts in (set(), {0}) or len(counts) > 1 or not all(0 <= p < num_patterns for heads in found for p in heads):
        raise ValueError(
            f"pattern_of_head must name one of {num_patterns} patterns for each of at least one head, "
            f"for as many heads in every sequence, got {list(pattern_of_head)}"
        )
    return found


def check_block_size(block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size}")


def _check_mask(mask: Tensor, block_size: int) -> None:
    check_block_size(block_size)
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask must be bool, got {mask.dtype}: compare it with 0 first")
    if mask.dim() != 3 or 0 in mask.shape:
        raise ValueError(
            f"the mask must be [heads, query blocks, key blocks], or that of each sequence, all at least 1, "
            f"got {list(mask.shape)}"
        )
