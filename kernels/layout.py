"""Which (query block, key block) pairs every head keeps, in the form that the kernels walk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .handles import register

BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Kept block pairs of every head, in global block coordinates.

    Query block i covers positions [i*B, (i+1)*B) and key block j the same for keys. Heads with equal masks
    share one pattern's storage. Build it with `from_mask` or `from_patterns`. Tensors are int32 on one device:

    - ``pattern_of_head`` [H]: which of the P patterns a head has.
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
        """Layout of a bool mask [H, n_q, n_k] (True: kept); equal heads are stored once.

        Raises ValueError for a mask of another dtype or rank, or an unsupported block size.
        """
        _check_mask(mask, block_size)
        first: dict[bytes, int] = {}
        pattern_of_head: list[int] = []
        distinct: list[int] = []
        for head, content in enumerate(mask.cpu().numpy()):
            key = hashlib.blake2b(content.tobytes()).digest()
            if key not in first:
                first[key] = len(distinct)
                distinct.append(head)
            pattern_of_head.append(first[key])
        return cls.from_patterns(mask[distinct], pattern_of_head, block_size, device=device)

    @classmethod
    def from_patterns(
        cls,
        masks_of_distinct: Tensor,
        pattern_of_head: Sequence[int],
        block_size: int,
        *,
        device: torch.device | str | None = None,
    ) -> BlockLayout:
        """Layout of P patterns, bool [P, n_q, n_k]; head h has pattern ``pattern_of_head[h]``.

        The tensors lie on `device`, by default the masks'. Raises ValueError as `from_mask` does, and
        for pattern indices outside [0, P).
        """
        masks = masks_of_distinct
        _check_mask(masks, block_size)
        num_patterns, num_query_blocks, num_key_blocks = masks.shape
        if not pattern_of_head or not all(0 <= p < num_patterns for p in pattern_of_head):
            raise ValueError(
                f"pattern_of_head must name one of {num_patterns} patterns for each of at least one head, "
                f"got {list(pattern_of_head)}"
            )
        pattern, i, j = masks.nonzero(as_tuple=True)  # in the order of rows
        row_offsets, row_columns = _compress(pattern * num_query_blocks + i, num_patterns * num_query_blocks, j)
        columns, by_column = (pattern * num_key_blocks + j).sort(stable=True)
        column_offsets, column_rows = _compress(columns, num_patterns * num_key_blocks, i[by_column])
        return cls(
            block_size=block_size,
            num_heads=len(pattern_of_head),
            num_query_blocks=num_query_blocks,
            num_key_blocks=num_key_blocks,
            pattern_of_head=torch.tensor(pattern_of_head, dtype=torch.int32, device=masks.device),
            row_offsets=row_offsets,
            row_columns=row_columns,
            column_offsets=column_offsets,
            column_rows=column_rows,
        ).to(masks.device if device is None else device)

    @property
    def device(self) -> torch.device:
        return self.row_offsets.device

    @property
    def nbytes(self) -> int:
        """Bytes of the index tensors (slices by `heads` share them)."""
        return sum(t.nbytes for t in self._tensors().values())

    @property
    def kept_blocks_of_heads(self) -> int:
        """About the number of kept pairs over all heads, patterns used alike: what the host knows without asking."""
        num_patterns = (self.row_offsets.numel() - 1) // self.num_query_blocks
        return self.row_columns.numel() * -(-self.num_heads // num_patterns)

    def mask(self) -> Tensor:
        """Bool [H, n_q, n_k], True where kept."""
        num_rows = self.row_offsets.numel() - 1
        counts = self.row_offsets.diff().long()
        rows = torch.repeat_interleave(torch.arange(num_rows, device=self.device), counts)
        flat = torch.zeros(num_rows, self.num_key_blocks, dtype=torch.bool, device=self.device)
        flat[rows, self.row_columns.long()] = True
        patterns = flat.view(-1, self.num_query_blocks, self.num_key_blocks)
        return patterns[self.pattern_of_head.long()]

    def heads(self, start: int, stop: int) -> BlockLayout:
        """The layout of heads [start, stop), such as one tensor-parallel rank's; shares the index tensors."""
        if not 0 <= start < stop <= self.num_heads:
            raise ValueError(f"heads({start}, {stop}): the layout has heads 0 to {self.num_heads}")
        if (start, stop) == (0, self.num_heads):
            return self
        return self._with(num_heads=stop - start, pattern_of_head=self.pattern_of_head[start:stop])

    def to(self, device: torch.device | str) -> BlockLayout:
        """This layout with its tensors on `device`; itself if they are there already."""
        moved = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        if moved["row_offsets"] is self.row_offsets:
            return self
        return self._with(**moved)

    def columns_by_work(self, num_kv_heads: int) -> Tensor:
        """Int32 [H_kv * n_k]: (KV head, key block) pairs ``kv_head * n_k + j``, most read first.

        Programs that start with the longest columns finish together.
        """
        key = ("columns_by_work", num_kv_heads)
        if key not in self.cache:
            counts = self.column_offsets.diff().view(-1, self.num_key_blocks)[self.pattern_of_head.long()]
            work = counts.view(num_kv_heads, -1, self.num_key_blocks).sum(1).flatten()
            self.cache[key] = work.argsort(descending=True, stable=True).to(torch.int32)
        return self.cache[key]

    def _tensors(self) -> dict[str, Tensor]:
        names = ("pattern_of_head", "row_offsets", "row_columns", "column_offsets", "column_rows")
        return {name: getattr(self, name) for name in names}

    def _with(self, **changes: Any) -> BlockLayout:
        sizes = ("block_size", "num_heads", "num_query_blocks", "num_key_blocks")
        return BlockLayout(**({name: getattr(self, name) for name in sizes} | self._tensors() | changes))


def _check_mask(mask: Tensor, block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size}")
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask must be bool, got {mask.dtype}: compare it with 0 first")
    if mask.dim() != 3 or 0 in mask.shape:
        raise ValueError(f"the mask must be [heads, query blocks, key blocks], all at least 1, got {list(mask.shape)}")


def _compress(lines: Tensor, num_lines: int, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted line numbers [kept] and indices [kept] to offsets [num_lines + 1] and the indices, as int32."""
    # kernels step over the indices in chunks with int32 counters
    if lines.numel() >= 2**31 - 2**16:
        raise ValueError(f"{lines.numel()} kept blocks are too many for 32-bit indices: use larger blocks")
    offsets = torch.zeros(num_lines + 1, dtype=torch.int64, device=lines.device)
    torch.cumsum(torch.bincount(lines, minlength=num_lines), 0, out=offsets[1:])
    return offsets.to(torch.int32), indices.to(torch.int32)
