"""vLLM's KV cache spec and manager of sparse layers.

Pages are freed after their last use. Entry j · slots + s of a sequence's page table is block j of slot s (`pages.py`).
Workers do not learn which pages are freed, so their tables keep numbers that other sequences use by now: attention
reads what the layout keeps, and never what the table lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashList,
    BlockHashListWithBlockSize,
    KVCacheBlock,
    make_block_hash_with_group_id,
)
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from s2train.serving.freeing import Expiry, Slot, last_uses, longest_hit, most_pages


@dataclass(frozen=True, kw_only=True)
class S2Spec(AttentionSpec):
    """Pages of one sparse layer.

    `block_size` is a page's tokens as vLLM counts them. The class is no FullAttentionSpec, whose pages vLLM would never
    free.

    Attributes:
        layout_block: tokens of a layout's block, B.
        slots: patterns of each slot's heads.
        max_length: tokens of the longest sequence.
        tokens_per_step: tokens of all sequences in a step.
    """

    layout_block: int
    slots: tuple[Slot, ...]
    max_length: int
    tokens_per_step: int

    def last_uses(self) -> np.ndarray:
        """Return the last query block that reads each page: int64 [blocks, slots]."""
        return last_uses(self.slots, -(-self.max_length // self.layout_block))

    def most_pages(self, max_length: int) -> int:
        """Return the maximum number of pages of one sequence of `max_length` tokens."""
        uses = last_uses(self.slots, -(-max_length // self.layout_block))
        return most_pages(uses, min(self.tokens_per_step, max_length), self.layout_block)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        # One more: vLLM's null page is among those that fit, and a sequence that lacks one waits forever.
        pages = self.most_pages(vllm_config.model_config.max_model_len) + 1
        return pages * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())


class S2Manager(SingleTypeKVCacheManager):
    """Allocates, caches and frees the pages of layers that have one `S2Spec`."""

    kv_cache_spec: S2Spec

    def __init__(self, kv_cache_spec: S2Spec, **settings: Any) -> None:
        super().__init__(kv_cache_spec, **settings)
        self._max_admission_blocks_per_request = kv_cache_spec.most_pages(kv_cache_spec.max_length)
        self._layout_block, self._slots = kv_cache_spec.layout_block, len(kv_cache_spec.slots)
        self._expiry = Expiry(kv_cache_spec.last_uses())
        self._freed: dict[str, int] = {}  # the query block up to which a request's pages are freed

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
    ) -> int:
        return super().get_num_blocks_to_allocate(
            request_id,
            self._whole_blocks(num_tokens),
            new_computed_blocks,
            total_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
        )

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        return super().allocate_new_blocks(request_id, self._whole_blocks(num_tokens), num_tokens_main_model)

    def remove_skipped_blocks(self, request_id: str, total_computed_tokens: int) -> None:
        """Free the pages that no query from position `total_computed_tokens` on reads."""
        blocks = self.req_to_blocks.get(request_id)
        first, stop = self._freed.get(request_id, 0), total_computed_tokens // self._layout_block
        if not blocks or stop <= first:
            return
        removed = []
        for entry in self._expiry.between(first, stop).tolist():
            if entry < len(blocks) and not blocks[entry].is_null:
                removed.append(blocks[entry])
                blocks[entry] = self._null_block
        self._freed[request_id] = stop
        self.block_pool.free_blocks(reversed(removed))

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._freed.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def cache_blocks(self, request: Request, num_tokens: int, retention_interval: int | None = None) -> None:
        """Make the pages of complete blocks findable.

        A page is found by the tokens up to its block's end, and its slot.
        """
        blocks, cached = self.req_to_blocks[request.request_id], self.num_cached_block.get(request.request_id, 0)
        first, stop = cached // self._slots, num_tokens // self._layout_block
        if stop <= first:
            return
        hashes: BlockHashList = request.block_hashes
        if self.block_size != self.block_pool.hash_block_size:
            hashes = BlockHashListWithBlockSize(request.block_hashes, self.block_pool.hash_block_size, self.block_size)
        for block in range(first, stop):
            for slot, key in enumerate(_keys(hashes, block, self._slots)):
                page = blocks[block * self._slots + slot]
                if not page.is_null and page.block_hash is None:
                    self.block_pool._insert_block_hash(
                        make_block_hash_with_group_id(key, self.kv_cache_group_id),
                        page,
                        num_tokens=(block + 1) * self._layout_block,
                    )
        self.num_cached_block[request.request_id] = stop * self._slots

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[list[KVCacheBlock], ...]:
        """Find the longest prefix whose needed pages are all cached.

        Needed pages are those that later queries read.
        """
        assert isinstance(kv_cache_spec, S2Spec)
        size, slots = kv_cache_spec.layout_block, len(kv_cache_spec.slots)
        uses = kv_cache_spec.last_uses()
        most = min(max_length // size, len(uses))
        found = [
            [block_pool.get_cached_block(key, kv_cache_group_ids) for key in _keys(block_hashes, block, slots)]
            for block in range(most)
        ]
        missing = np.array([[page is None for page in pages] for pages in found], dtype=bool).reshape(most, slots)
        step = np.lcm(alignment_tokens, size) // size
        length = longest_hit(uses, missing, int(step))
        hit: tuple[list[KVCacheBlock], ...] = tuple([] for _ in kv_cache_group_ids)
        for block in range(length):
            for slot, pages in enumerate(found[block]):
                is_read = uses[block, slot] >= length
                for number, of_group in enumerate(hit):
                    of_group.append(pages[number] if is_read and pages is not None else block_pool.null_block)
        return hit

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        return 0  # no cascade attention

    def _whole_blocks(self, num_tokens: int) -> int:
        """Round a number of tokens up to whole blocks.

        The pages of all slots are needed from a block's first token on.
        """
        return -(-num_tokens // self._layout_block) * self._layout_block


def _keys(hashes: BlockHashList, block: int, slots: int) -> list[BlockHash]:
    """Return each slot's key of a block.

    Keys are made from the hash of the tokens up to the block's end.
    """
    end = hashes[(block + 1) * slots - 1]
    return [BlockHash(end + slot.to_bytes(2, "big")) for slot in range(slots)]


KVCacheSpecRegistry._ensure_registered()  # vLLM's own, which it registers only where there is no other
KVCacheSpecRegistry.register(S2Spec, S2Manager)
