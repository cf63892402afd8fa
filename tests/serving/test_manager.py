"""Pages of sparse layers in vLLM's pool: what is held, freed and found again."""

import hashlib
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.core.block_pool import BlockPool

from s2train.layouts.patterns import Dense, LocalVertical
from s2train.layouts.patterns.ranges import Ranges
from s2train.layouts.patterns.window import SlidingWindow
from s2train.serving.freeing import slots_of
from s2train.serving.kv_cache import S2Manager, S2Spec

BLOCK, SLOTS, BLOCKS, PAGES = 32, 4, 12, 200
PAGE_TOKENS = BLOCK // SLOTS
HEADS = [LocalVertical(2, 4, 1), LocalVertical(1, 3, 0), SlidingWindow(2, 1), Ranges(((1, 1), (3, 2), (None, 4)), 1)]


def spec_of(heads: list[Any] = HEADS, tokens_per_step: int = 70) -> S2Spec:
    return S2Spec(
        block_size=PAGE_TOKENS,
        num_kv_heads=SLOTS,
        head_size=32,
        dtype=torch.float32,
        layout_block=BLOCK,
        slots=slots_of(heads, SLOTS, 1, 1),
        max_length=BLOCK * BLOCKS,
        tokens_per_step=tokens_per_step,
    )


def manager(heads: list[Any] = HEADS, tokens_per_step: int = 70, pages: int = PAGES) -> S2Manager:
    return S2Manager(
        spec_of(heads, tokens_per_step),
        block_pool=BlockPool(pages, True, PAGE_TOKENS),
        enable_caching=True,
        kv_cache_group_id=0,
        scheduler_block_size=BLOCK,
    )


def request(name: str, tokens: list[int]) -> Any:
    """What a manager reads of a request: its name, and hashes of the tokens up to each page's end."""
    digest, hashes = hashlib.sha256(), []
    for end in range(PAGE_TOKENS, len(tokens) + 1, PAGE_TOKENS):
        digest.update(bytes(tokens[end - PAGE_TOKENS : end]))
        hashes.append(digest.digest())
    return SimpleNamespace(request_id=name, block_hashes=hashes, num_prompt_tokens=len(tokens))


def step(pages: S2Manager, of: Any, computed: int, new: int, hit: list[Any] | None = None) -> int:
    """Schedule tokens as vLLM does; return the pages that were taken."""
    pages.remove_skipped_blocks(of.request_id, computed)
    count = pages.get_num_blocks_to_allocate(of.request_id, computed + new, hit or [], computed, computed + new)
    if hit is not None:
        pages.add_local_computed_blocks(of.request_id, hit, computed, 0)
    before = pages.block_pool.get_num_free_blocks()
    pages.allocate_new_blocks(of.request_id, computed + new, computed + new)
    pages.cache_blocks(of, computed + new)
    taken = before - pages.block_pool.get_num_free_blocks()
    assert taken == count or hit
    return taken


def held(pages: S2Manager, name: str) -> np.ndarray:
    """Which pages of which block a request holds: bool [blocks, slots]."""
    return np.array([not page.is_null for page in pages.req_to_blocks[name]]).reshape(-1, SLOTS)


def find(pages: S2Manager, tokens: list[int]) -> list[Any]:
    (hit,) = S2Manager.find_longest_cache_hit(
        request("", tokens).block_hashes, len(tokens) - 1, [0], pages.block_pool, pages.kv_cache_spec, False, BLOCK
    )
    return hit


def test_a_request_holds_what_a_later_query_reads() -> None:
    pages, of = manager(), request("a", [1] * BLOCK * BLOCKS)
    uses, computed, most = pages.kv_cache_spec.last_uses(), 0, 0
    while computed < BLOCK * BLOCKS:
        new = min(random.choice([1, 5, 32, 70]), BLOCK * BLOCKS - computed)
        step(pages, of, computed, new)
        found, query = held(pages, "a"), computed // BLOCK
        assert len(found) == -(-(computed + new) // BLOCK)
        assert np.array_equal(found[:query], uses[:query] >= query)
        assert found[query:].all()
        most = max(most, int(found.sum()))
        assert PAGES - 1 - pages.block_pool.get_num_free_blocks() == found.sum()
        computed += new
    assert most <= pages._max_admission_blocks_per_request < BLOCKS * SLOTS
    pages.free("a")
    assert pages.block_pool.get_num_free_blocks() == PAGES - 1
    assert pages._freed == {}


def test_a_dense_head_keeps_its_pages() -> None:
    pages, of = manager([Dense(), *HEADS[1:]]), request("a", [1] * BLOCK * BLOCKS)
    for computed in range(0, BLOCK * BLOCKS, 64):
        step(pages, of, computed, 64)
    assert held(pages, "a").all(0).tolist() == [True, False, False, False]


def test_a_prefix_is_found_with_the_pages_that_its_continuation_reads() -> None:
    tokens = [random.randrange(90) for _ in range(BLOCK * 7 + 9)]
    pages = manager()
    first = request("a", tokens)
    for computed in range(0, len(tokens), 50):
        step(pages, first, computed, min(50, len(tokens) - computed))
    pages.free("a")
    longer = [*tokens, *range(40)]
    hit = find(pages, longer)
    uses = pages.kv_cache_spec.last_uses()
    assert len(hit) == 7 * SLOTS
    found = np.array([not page.is_null for page in hit]).reshape(7, SLOTS)
    assert np.array_equal(found, uses[:7] >= 7)
    second = request("b", longer)
    step(pages, second, 7 * BLOCK, len(longer) - 7 * BLOCK, hit)
    assert [page.block_id for page in pages.req_to_blocks["b"][: len(hit)]] == [page.block_id for page in hit]
    pages.free("b")
    assert pages.block_pool.get_num_free_blocks() == PAGES - 1


def test_a_block_that_differs_in_its_last_token_is_not_found() -> None:
    tokens = [random.randrange(90) for _ in range(BLOCK * 4)]
    pages = manager()
    step(pages, request("a", tokens), 0, len(tokens))
    other = [*tokens[: BLOCK * 3 - 1], 91, *tokens[BLOCK * 3 :]]
    assert len(find(pages, [*other, 1])) == 2 * SLOTS
    assert len(find(pages, [*tokens, 1])) == 4 * SLOTS
    assert find(pages, [92, *tokens]) == []


def test_pages_that_were_taken_again_are_not_found() -> None:
    tokens = [random.randrange(90) for _ in range(BLOCK * 6)]
    pages = manager()
    step(pages, request("a", tokens), 0, len(tokens))
    pages.free("a")
    assert len(find(pages, [*tokens, 1])) == 6 * SLOTS
    taken = pages.block_pool.get_new_blocks(PAGES - 1)
    assert find(pages, [*tokens, 1]) == []
    pages.block_pool.free_blocks(taken)


def test_the_longest_sequence_runs_in_the_memory_that_it_is_said_to_need() -> None:
    length = BLOCK * BLOCKS
    spec = spec_of([Dense()] * SLOTS, tokens_per_step=length)
    needed: Any = SimpleNamespace(model_config=SimpleNamespace(max_model_len=length))
    pages = manager([Dense()] * SLOTS, length, spec.max_memory_usage_bytes(needed) // spec.page_size_bytes)
    assert step(pages, request("a", [0] * length), 0, length) == BLOCKS * SLOTS
