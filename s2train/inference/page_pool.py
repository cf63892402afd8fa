"""Allocates pages of keys and values from a pool."""

import numpy as np
import torch


class OutOfPagesError(RuntimeError):
    """Raised if pages or the device's memory run out."""


class PagePool:
    """Pool of `num_pages` pages for all layers and sequences.

    A page holds one key block of one KV head.

    Attributes:
        keys, values: [num_pages + 1, block_size, head_dim]; the last page is never read.
        page_bytes: bytes of one page, keys and values together.
    Raises:
        OutOfPagesError: the device has no memory for the pool.
    """

    def __init__(
        self, num_pages: int, block_size: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_pages + 1, block_size, head_dim)
        self.num_pages = num_pages
        self.page_bytes = 2 * block_size * head_dim * dtype.itemsize
        try:
            self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        except torch.OutOfMemoryError as error:
            raise OutOfPagesError(
                f"{num_pages} pages of {self.page_bytes:,} bytes, {num_pages * self.page_bytes / 1e9:,.1f} GB of keys "
                "and values, don't fit this device: decode with a smaller batch_size, shorter sequences or more tp"
            ) from error
        self._free = np.arange(num_pages, dtype=np.int32)[::-1].copy()  # a stack
        self._num_free = num_pages

    @property
    def used(self) -> int:
        """Number of pages in use."""
        return self.num_pages - self._num_free

    def take(self, count: int) -> np.ndarray:
        """Allocate `count` pages: int32 [count].

        Raises:
            OutOfPagesError: fewer are free; then none is allocated.
        """
        if count > self._num_free:
            raise OutOfPagesError(
                f"{count} pages of {self.page_bytes:,} bytes are needed, but {self._num_free} of {self.num_pages} are "
                "free"
            )
        self._num_free -= count
        return self._free[self._num_free : self._num_free + count].copy()

    def give(self, pages: np.ndarray) -> None:
        """Free pages."""
        self._free[self._num_free : self._num_free + len(pages)] = pages
        self._num_free += len(pages)
