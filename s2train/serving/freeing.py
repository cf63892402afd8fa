"""Which pages of a sparse layer a sequence still needs.

This module doesn't use vLLM. Entry j · slots + s of a sequence's page table is block j of slot s (`pages.py`). Its last
use is the last query block that reads it, by any head of the slot.
"""

import json
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from s2train.checkpoints.hugging_face.layout_json import pattern_from_json, pattern_json
from s2train.costs.kv_cache import last_queries
from s2train.layouts.patterns import Pattern

Slot = tuple[str, ...]  # patterns of a slot's query heads, as JSON: hashable, and the same in every process


def slots_of(heads: Sequence[Pattern], num_kv_heads: int, heads_per_page: int, tp: int) -> tuple[Slot, ...]:
    """Return the patterns of each slot of a rank.

    All ranks have one page table: a slot's page is needed as long as any rank needs it.

    Args:
        heads: patterns of the model's query heads in this layer.
        num_kv_heads: KV heads of one rank.
        tp: number of tensor parallel ranks.
    """
    group = len(heads) // (num_kv_heads * tp)  # query heads of a KV head
    written = [json.dumps(pattern_json(head), sort_keys=True) for head in heads]
    found = []
    for first in range(0, num_kv_heads, heads_per_page):
        kv_heads = [rank * num_kv_heads + first + n for rank in range(tp) for n in range(heads_per_page)]
        found.append(tuple(sorted({written[kv * group + n] for kv in kv_heads for n in range(group)})))
    return tuple(found)


@cache
def last_uses(slots: tuple[Slot, ...], num_blocks: int) -> np.ndarray:
    """Return the last query block that reads each page.

    The result is int64 [num_blocks, slots], read-only.
    """
    with torch.device("cpu"):  # a loader may have set another default
        of_pattern = {
            text: last_queries(pattern_from_json(json.loads(text)), num_blocks)
            for text in dict.fromkeys(text for slot in slots for text in slot)
        }
        uses = torch.stack([torch.stack([of_pattern[text] for text in slot]).amax(0) for slot in slots], dim=1).numpy()
    uses.flags.writeable = False
    return uses


def held_pages(uses: np.ndarray) -> np.ndarray:
    """Count the pages that a sequence holds before each query block.

    Counts pages of complete blocks: int64 [num_blocks + 1].
    """
    size = len(uses)
    blocks = np.broadcast_to(np.arange(size)[:, None], uses.shape)
    read_later = uses > blocks
    change = np.zeros(size + 2, dtype=np.int64)
    np.add.at(change, blocks[read_later] + 1, 1)
    np.add.at(change, uses[read_later] + 1, -1)
    return change.cumsum()[: size + 1]


def most_pages(uses: np.ndarray, tokens_per_step: int, block_size: int) -> int:
    """Return the maximum number of pages of a sequence.

    Includes the pages that a step of `tokens_per_step` tokens writes.
    """
    held, (size, slots) = held_pages(uses), uses.shape
    new = -(-tokens_per_step // block_size) + 1  # a step may begin and end within blocks
    first = np.arange(size)
    return int((held[:size] + slots * np.minimum(new, size - first)).max())


def longest_hit(uses: np.ndarray, missing: np.ndarray, step: int) -> int:
    """Return the number of blocks of the longest complete prefix.

    A prefix is complete if every page of it that later queries read is there.

    Args:
        uses: last uses [num_blocks, slots].
        missing: bool [n, slots]: pages that are not there; the answer is at most n.
        step: it is a multiple of this.
    """
    most = len(missing)
    block, slot = missing.nonzero()
    last = np.minimum(uses[block, slot], most)
    change = np.zeros(most + 2, dtype=np.int64)
    np.add.at(change, block + 1, 1)  # a prefix of block + 1 to `last` blocks needs the page
    np.add.at(change, np.maximum(last, block) + 1, -1)
    complete = (change.cumsum()[: most + 1] == 0) & (np.arange(most + 1) % step == 0)
    return int(complete.nonzero()[0].max())


class Expiry:
    """Entries of a page table in the order of their last use."""

    def __init__(self, uses: np.ndarray) -> None:
        flat = uses.ravel()
        self._order = np.argsort(flat, kind="stable")
        self._bounds = np.searchsorted(flat[self._order], np.arange(len(uses) + 1))

    def between(self, first: int, stop: int) -> np.ndarray:
        """Return the entries last used by query blocks [first, stop)."""
        return self._order[self._bounds[first] : self._bounds[min(stop, len(self._bounds) - 1)]]
