"""Keep what is derived from the bounds of packed documents."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_KEPT = 16  # all layers share a sequence's bounds; a micro batch may have many sequences
_anew = ContextVar("_anew", default=False)


@contextmanager
def built_anew() -> Iterator[None]:
    """Have `of_documents` keep nothing, and look for nothing.

    A compiled graph writes other values to a tensor that it no longer needs, and torch doesn't count that as a change.
    """
    token = _anew.set(True)
    try:
        yield
    finally:
        _anew.reset(token)


def of_documents(cache: dict[Any, Any], key: Hashable, cu_seqlens: Tensor, num_rows: int, build: Callable[[], T]) -> T:
    """Return `build()`, or an earlier result for these very bounds.

    All layers of a step share `cu_seqlens`; a context parallel rank has those of two chunks, of new lengths in every
    micro batch.

    Args:
        cache: keeps the last results under `key`, which names what is built, and of what else than the documents.
        num_rows: of the documents together.
    """
    # a CUDA graph must build again in every replay, from the current contents of `cu_seqlens`
    capturing = cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing or _anew.get() or cu_seqlens.is_inference():
        return build()
    kept: list[tuple[Tensor, tuple[int, int], T]] = cache.setdefault(key, [])
    state = cu_seqlens._version, num_rows
    for bounds, known, found in kept:
        if bounds is cu_seqlens and known == state:
            return found
    built = build()
    kept.append((cu_seqlens, state, built))
    del kept[:-_KEPT]
    return built
