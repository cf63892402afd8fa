"""Block layouts: which (query block, key block) pairs every head keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import Tensor

from .call import Call
from .handles import register
from .layout_builder import MaskRule, Rule, column_lines, compress, row_lines
from .transfer import fields_to_device, to_device

BLOCK_SIZES = (16, 32, 64, 128, 256)
_SCHEDULED_ON_HOST = 2**18  # kept pairs, of which a schedule takes 0.07 s
# pattern index of each head, or of each head of each sequence
Patterns = Sequence[int] | Sequence[Sequence[int]]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Kept block pairs of every head, in the form that kernels read.

    Query block i covers positions [i*B, (i+1)*B); key block j covers the same range of keys. Heads with equal masks
    share the storage of one pattern. Build a layout with `from_mask`, `from_patterns` or `from_rule`; building makes
    the host wait for the device. For masks that change in every step use `TopKLayout`. All tensors are int32 and lie
    on one device:

    - ``pattern_of_head`` [1 or batch, H]: which of the P patterns a head has, for all sequences or for each one.
    - ``row_offsets`` [P*n_q + 1], ``row_columns`` [kept]: CSR. Query block i of pattern p keeps key blocks
      ``row_columns[row_offsets[p*n_q + i] : row_offsets[p*n_q + i + 1]]``, ascending.
    - ``column_offsets`` [P*n_k + 1], ``column_rows`` [kept]: CSC. The query blocks that keep a key block, ascending.
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
    # the layout on the host that this is a copy of: schedules are built from it, so that the host doesn't wait
    on_host: BlockLayout | None = field(default=None, repr=False, kw_only=True)
    # data that backends derive from the layout once (token masks, work order); not part of its meaning
    cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    # identifies this object in compiled graphs, which hold only numbers
    handle: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "handle", register(self))

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy is a separate object with its own handle and cache
        sizes = (self.block_size, self.num_heads, self.num_query_blocks, self.num_key_blocks)
        return BlockLayout, (*sizes, *self._tensors().values())

    @classmethod
    def from_mask(cls, mask: Tensor, block_size: int, *, device: torch.device | str | None = None) -> BlockLayout:
        """Build a layout from a bool mask, True where kept.

        The mask is [H, n_q, n_k], or [batch, H, n_q, n_k]; equal heads are stored once. Raises ValueError for a mask of
        another dtype or rank, or an unsupported block size.
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
        """Build a layout from P patterns, bool [P, n_q, n_k].

        Head h has pattern ``pattern_of_head[h]``; with a batch axis, head h of sequence b has
        ``pattern_of_head[b][h]``. The tensors lie on `device`, by default the masks'.

        Raises ValueError as `from_mask` does, and for pattern indices outside [0, P).
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
        """Build a layout from P rules on `device`, without full masks.

        Head h has rule ``pattern_of_head[h]``; with a batch axis, head h of sequence b has ``pattern_of_head[b][h]``. A
        rule takes int64 block indices (query, key) on `device` that broadcast, and returns a bool of the broadcast
        shape. It is called several times, for ranges of rows and of columns. Scratch memory is at most 40 MB for any
        length, if rules take at most 16 bytes a pair. A `ColumnRule` is not evaluated pair by pair: its time grows with
        the number of kept blocks.

        Raises ValueError for an unsupported block size, no rules or no blocks, pattern indices outside [0, P), a rule
        that returns another type or shape or gives different answers, and more kept blocks than 32 bits can index.
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
        """Number of sequences with their own patterns; 1 if all share them."""
        return self.pattern_of_head.shape[0]

    @property
    def compiled(self) -> dict[Any, Any]:
        """Kernels compiled for this layout's device."""
        return self.cache

    @property
    def calls(self) -> dict[Any, Call]:
        """Recent calls with this layout, by their arguments."""
        kept: dict[Any, Call] = self.cache.setdefault("calls", {})
        return kept

    @property
    def nbytes(self) -> int:
        """Bytes of the index tensors; slices made by `heads` share them."""
        return sum(t.nbytes for t in self._tensors().values())

    @property
    def kept_blocks_of_heads(self) -> int:
        """Estimate the kept pairs over all heads without reading the device.

        Assumes that all patterns are used equally often.
        """
        num_patterns = (self.row_offsets.numel() - 1) // self.num_query_blocks
        return self.row_columns.numel() * -(-self.pattern_of_head.numel() // num_patterns)

    def patterns_of_heads(self, purpose: str) -> Tensor:
        """Return each head's pattern, int32 [H], the same for every sequence.

        Args:
            purpose: what needs one layout for the whole batch; named in the error.

        Raises:
            ValueError: sequences of the batch have different patterns.
        """
        if self.batch_size != 1:
            raise ValueError(
                f"{purpose} takes one layout for all sequences, this one has {self.batch_size}: build a layout without "
                "a batch axis"
            )
        return self.pattern_of_head[0]

    def mask(self) -> Tensor:
        """Return the bool mask [H, n_q, n_k], True where kept.

        If sequences of a batch differ, the mask is [batch, H, n_q, n_k].
        """
        num_rows = self.row_offsets.numel() - 1
        counts = self.row_offsets.diff().long()
        rows = torch.repeat_interleave(torch.arange(num_rows, device=self.device), counts)
        flat = torch.zeros(num_rows, self.num_key_blocks, dtype=torch.bool, device=self.device)
        flat[rows, self.row_columns.long()] = True
        patterns = flat.view(-1, self.num_query_blocks, self.num_key_blocks)
        return patterns[self.pattern_of_head.long().squeeze(0)]

    def heads(self, start: int, stop: int) -> BlockLayout:
        """Return the layout of heads [start, stop), sharing the index tensors.

        For example, those of one tensor-parallel rank.
        """
        if not 0 <= start < stop <= self.num_heads:
            raise ValueError(f"heads({start}, {stop}): the layout has heads 0 to {self.num_heads}")
        if (start, stop) == (0, self.num_heads):
            return self
        return self._with(num_heads=stop - start, pattern_of_head=self.pattern_of_head[:, start:stop].contiguous())

    def to(self, device: torch.device | str) -> BlockLayout:
        """Return this layout on `device`; itself if already there."""
        moved = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        if moved["row_offsets"] is self.row_offsets:
            return self
        return self._with(**moved)

    def copied_to(self, device: torch.device | str) -> BlockLayout:
        """Copy this layout to a device, and keep it for schedules.

        Takes a layout on the host, which waits neither here nor where kernels run with the copy. Schedules of very many
        pairs take the host too long: the device makes them, and the host waits.
        """
        if torch.device(device) == self.device:
            return self
        copied = {name: to_device(x, device) for name, x in self._tensors().items()}
        few = len(self.row_columns) <= _SCHEDULED_ON_HOST
        return self._with(**copied, on_host=self if few else None)

    def scheduled(self, build: Callable[[BlockLayout], T]) -> T:
        """Build a schedule, on the host if this is a copy.

        Args:
            build: takes this layout, or the one that it is a copy of, and returns a dataclass or None.
        Returns:
            its tensors are on this layout's device.
        """
        built = build(self.on_host or self)
        return built if built is None else fields_to_device(built, self.device)

    def columns_by_work(self, num_kv_heads: int) -> Tensor:
        """Call the function `columns_by_work` and cache its result."""
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
    """Sort the key blocks of all KV heads by queries, most first.

    Returns int32 [batch * H_kv * n_k]. Key block j of KV head h in sequence b is number ``(b * H_kv + h) * n_k + j``; b
    is 0 if all sequences share their patterns. Starting with the longest columns makes programs finish at about the
    same time.

    Args:
        column_offsets: int32 [P * n_k + 1], as in `BlockLayout`.
        pattern_of_head: int32 [1 or batch, H].
    """
    counts = column_offsets.diff().view(-1, num_key_blocks)[pattern_of_head.long()]
    work = counts.view(len(pattern_of_head) * num_kv_heads, -1, num_key_blocks).sum(1).flatten()
    return work.argsort(descending=True, stable=True).to(torch.int32)


def _by_sequence(pattern_of_head: Patterns, num_patterns: int) -> list[list[int]]:
    """Return patterns [1 or batch][H] after checking indices and lengths.

    Raises ValueError for an index outside [0, num_patterns), no heads, or sequences with different numbers of heads.
    """
    alone = [int(p) for p in pattern_of_head if isinstance(p, Integral)]  # numpy's integers too
    of_sequences = [list(map(int, heads)) for heads in pattern_of_head if not isinstance(heads, int | Integral)]
    found = [alone] if alone else of_sequences
    if alone and of_sequences:
        raise ValueError(f"pattern_of_head mixes patterns with lists of patterns: {list(pattern_of_head)}")
    counts = {len(heads) for heads in found}
    if counts in (set(), {0}) or len(counts) > 1 or not all(0 <= p < num_patterns for heads in found for p in heads):
        raise ValueError(
            f"pattern_of_head must list one of {num_patterns} patterns for each of at least one head, "
            f"with the same number of heads in every sequence, got {list(pattern_of_head)}"
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
            f"the mask must be [heads, query blocks, key blocks], with or without a batch axis, all at least 1, "
            f"got {list(mask.shape)}"
        )
