"""Layouts made at run time from top-k lists of key blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from .layout import BlockLayout, check_block_size, columns_by_work
from .topk_lists import kept_columns, kept_rows

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class TopKLayout:
    """Kept key blocks of every query block, from a top-k.

    Build it with `from_indices` in every step. The host reads nothing, and new indices need no new kernel. The index
    lists that kernels read are built on the device when a call first needs them, separately for forward and backward.
    They stay in ``cache`` for the layout's lifetime.

    Attributes:
        indices: int32 [batch, H or H_kv, n_q, k], contiguous: key blocks in any order; -1 marks an unused slot. With
            H_kv lists, the query heads of a KV head share one. A block that is listed twice counts once. Key blocks
            after the query block are allowed: a causal call masks them. A list of only -1 keeps nothing.
        block_size: positions of a query block and of a key block.
        num_heads: query heads H.
        num_key_blocks: n_k; indices are below it.
        cache: data that backends derive from the indices; not part of the layout's meaning.
    """

    indices: Tensor
    block_size: int
    num_heads: int
    num_key_blocks: int
    cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_indices(
        cls, indices: Tensor, block_size: int, *, num_heads: int, num_key_blocks: int | None = None
    ) -> TopKLayout:
        """Build a layout from indices [batch, H or H_kv, n_q, k].

        Indices are int32 or int64.

        Args:
            num_key_blocks: by default the number of query blocks.

        Raises:
            ValueError: the dtype or shape is wrong, H is not a multiple of the number of lists, the block size is
                unsupported, or there are more slots than 32 bits can index. An index outside [-1, num_key_blocks)
                raises ValueError when the layout is used on a CPU. On a GPU, where reading it would stall, a
                device-side assertion fails.
        """
        check_block_size(block_size)
        if indices.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"indices must be int32 or int64, got {indices.dtype}: cast them")
        if indices.dim() != 4 or 0 in indices.shape:
            raise ValueError(
                "indices must be [batch, heads or KV heads, query blocks, k], all at least 1, "
                f"got {list(indices.shape)}"
            )
        if num_heads < 1 or num_heads % indices.shape[1] != 0:
            raise ValueError(
                f"indices have {indices.shape[1]} lists a query block for {num_heads} heads: give one for each head, "
                "or one for each KV head"
            )
        n_k = indices.shape[2] if num_key_blocks is None else num_key_blocks
        if n_k < 1:
            raise ValueError(f"num_key_blocks must be at least 1, got {n_k}")
        if indices.numel() >= 2**31 - 2**16:  # kernels advance in chunks with int32 counters
            raise ValueError(f"{indices.numel()} slots are too many for 32-bit indices: use larger blocks")
        if indices.dtype == torch.int64:  # what is out of range stays so in 32 bits
            ends = torch.iinfo(torch.int32)
            indices = indices.clamp(ends.min, ends.max)
        return cls(indices.to(torch.int32).contiguous(), block_size, num_heads, n_k)

    def to(self, device: torch.device | str) -> TopKLayout:
        """Return this layout on `device`; itself if already there."""
        moved = self.indices.to(device)
        if moved is self.indices:
            return self
        return TopKLayout(moved, self.block_size, self.num_heads, self.num_key_blocks)

    @property
    def device(self) -> torch.device:
        return self.indices.device

    @property
    def batch_size(self) -> int:
        return self.indices.shape[0]

    @property
    def num_lists(self) -> int:
        """Lists per query block: H, or H_kv where a group shares one."""
        return self.indices.shape[1]

    @property
    def num_query_blocks(self) -> int:
        return self.indices.shape[2]

    @property
    def slots(self) -> int:
        """Slots per list, k."""
        return self.indices.shape[3]

    @property
    def kept_blocks_of_heads(self) -> int:
        """Upper bound of the kept pairs over all heads."""
        lists = self.batch_size * self.num_heads * self.num_query_blocks
        return lists * min(self.slots, self.num_key_blocks)

    @property
    def compiled(self) -> dict[Any, Any]:
        """Kernels compiled on this device.

        Shared by layouts, each of which lives one step.
        """
        return _compiled_kernels(self.device)

    def check_values(self) -> None:
        """Reject indices outside [-1, num_key_blocks).

        Raises ValueError on a CPU; on a GPU a device-side assertion fails.
        """
        self.built("checked", self._check_values)

    def _check_values(self) -> None:
        least, most = self.indices.aminmax()
        if self.device.type == "cpu":
            if least < -1 or most >= self.num_key_blocks:
                raise ValueError(
                    f"indices must be -1 or key blocks below {self.num_key_blocks}, got {int(least)} to {int(most)}"
                )
        elif self.device.type != "meta":
            sound = (least >= -1) & (most < self.num_key_blocks)
            torch._assert_async(sound, "indices of a TopKLayout must be -1 or key blocks below num_key_blocks")

    def mask(self) -> Tensor:
        """Return the bool mask [batch, H, n_q, n_k], the kernels' oracle."""
        n_k = self.num_key_blocks
        kept = torch.zeros(*self.indices.shape[:3], n_k + 1, dtype=torch.bool, device=self.device)
        column = torch.where(self.indices < 0, n_k, self.indices).long()
        kept = kept.scatter_(-1, column, True)[..., :n_k]
        return kept.repeat_interleave(self.num_heads // self.num_lists, 1)

    # the same fields as `BlockLayout`'s, for the portable kernels: one pattern per list, room for every slot

    @property
    def pattern_of_head(self) -> Tensor:
        """Int32 [batch, H]."""
        return self.built("pattern_of_head", self._pattern_of_head)

    @property
    def row_offsets(self) -> Tensor:
        """Int32 [batch * lists * n_q + 1]."""
        return self.built("rows", lambda: kept_rows(self.indices, self.num_key_blocks))[0]

    @property
    def row_columns(self) -> Tensor:
        """Int32 [slots of all lists]; entries after the last offset are undefined."""
        return self.built("rows", lambda: kept_rows(self.indices, self.num_key_blocks))[1]

    @property
    def column_offsets(self) -> Tensor:
        """Int32 [batch * lists * n_k + 1]."""
        return self.built("columns", lambda: kept_columns(self.indices, self.num_key_blocks))[0]

    @property
    def column_rows(self) -> Tensor:
        """Int32 [slots of all lists]; entries after the last offset are undefined."""
        return self.built("columns", lambda: kept_columns(self.indices, self.num_key_blocks))[1]

    def columns_by_work(self, num_kv_heads: int) -> Tensor:
        """Call the function `columns_by_work` and cache its result."""
        sizes = (num_kv_heads, self.num_key_blocks)
        return self.built(
            ("columns by work", num_kv_heads),
            lambda: columns_by_work(self.column_offsets, self.pattern_of_head, *sizes),
        )

    def built(self, name: Any, build: Callable[[], T]) -> T:
        """Cache what `build` returns until the indices are written to.

        In a CUDA graph `build` is captured and runs in every replay, on the indices of that replay. Indices made in
        inference mode don't count writes, so that every use rebuilds.
        """
        if self.indices.is_inference() or (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return build()
        version = self.indices._version
        kept = self.cache.get(name)
        if kept is None or kept[0] != version:
            kept = self.cache[name] = (version, build())
        found: T = kept[1]
        return found

    def _pattern_of_head(self) -> Tensor:
        lists = torch.arange(self.batch_size * self.num_lists, dtype=torch.int32, device=self.device)
        return lists.repeat_interleave(self.num_heads // self.num_lists).view(self.batch_size, self.num_heads)


@functools.cache
def _compiled_kernels(device: torch.device) -> dict[Any, Any]:
    return {}


Layout = BlockLayout | TopKLayout
