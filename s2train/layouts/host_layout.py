"""Copy a layout's kept pairs to the host."""

from dataclasses import dataclass

import numpy as np

from s2train.kernels.layout import BlockLayout

_CACHED = "kept pairs on the host"


@dataclass(frozen=True)
class HostLayout:
    """Kept pairs of a layout that all sequences share.

    Attributes:
        block_size: tokens.
        num_rows: query blocks.
        pattern_of_head: int32 [H].
        offsets: int32 [P · num_rows + 1], as `BlockLayout.row_offsets`.
        columns: int32 [kept], as `BlockLayout.row_columns`.
    """

    block_size: int
    num_rows: int
    pattern_of_head: np.ndarray
    offsets: np.ndarray
    columns: np.ndarray

    @classmethod
    def of(cls, layout: BlockLayout) -> "HostLayout":
        """Copy a layout. The host waits for its device."""
        tensors = layout.patterns_of_heads("context parallelism"), layout.row_offsets, layout.row_columns
        return cls(layout.block_size, layout.num_query_blocks, *(x.cpu().numpy() for x in tensors))

    @classmethod
    def cached(cls, layout: BlockLayout) -> "HostLayout":
        """Copy a layout once; the copy is kept in its cache."""
        if _CACHED not in layout.cache:
            layout.cache[_CACHED] = cls.of(layout)
        found = layout.cache[_CACHED]
        assert isinstance(found, cls)
        return found

    @property
    def num_patterns(self) -> int:
        return (len(self.offsets) - 1) // self.num_rows
