"""Backward schedule of top-k lists on Hopper, without host reads.

Three launches and a cleared buffer build it. First the lists become bits, by key block: `atomic_or` gives the same
result in any order, and for a block that is listed twice. Then each pair of key tiles counts its steps, reserves space
and writes them. Last the pairs are ordered. A fourth launch may cut long pairs before (`pair_parts`).
"""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..column_parts import SUM_COLUMNS
from ..configs import multiprocessors
from ..fp_fusion import with_fp_fusion
from ..launch import launch
from ..topk_layout import TopKLayout
from .backward_schedule import ACTIVE_BITS, QUERY_BITS, TILE, BackwardSchedule
from .pair_parts import PairParts, cut_topk_pairs, most_topk_slots

_SLOTS_AT_ONCE = 1024
_TILES_AT_ONCE = 256
_PAIRS_RANKED = 32
_PAIRS_COMPARED = 256
_MOST_RANKED = 16384
_LAG = 1.5  # of `program_order`, which simulates several values on the host
_WORD = 32  # query blocks in a word
_ACTIVE_BITS = tl.constexpr(ACTIVE_BITS)
_QUERY_BITS = tl.constexpr(QUERY_BITS)
_TILE = tl.constexpr(TILE)


@with_fp_fusion
@triton.jit(do_not_specialize=["num_slots", "slots", "num_query_blocks", "num_key_blocks", "words"])
def s2_attention_kernel_topk_bits(
    indices, bits, num_slots, slots, num_query_blocks, num_key_blocks, words, AT_ONCE: tl.constexpr
):  # fmt: skip
    """Set the bits of query blocks that list a key block.

    Bits are [lists, key blocks, words].
    """
    at = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    column = tl.load(indices + at, mask=at < num_slots, other=-1)
    row = at // slots
    list_number = row // num_query_blocks
    row = row % num_query_blocks
    word = (list_number.to(tl.int64) * num_key_blocks + column) * words + row // 32
    tl.atomic_or(bits + word, 1 << row % 32, mask=(column >= 0) & (column < num_key_blocks))


@triton.jit
def _steps(
    bits, first_key, tiles, first_tile, num_key_blocks, words, s_k, PER_BLOCK: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    """Find which of two key tiles the query `tiles` keep.

    The key tiles are `first_key` and the next one; the query tiles belong to one list. Returns bits 0 and 1 for the two
    tiles, and two bools: steps that need a mask, and steps that need none.
    """
    active = tiles * 0
    row = tiles // PER_BLOCK
    for side in tl.static_range(2):
        key = first_key + side
        column = key // PER_BLOCK
        seen = (tiles >= first_tile) & (column < num_key_blocks) & (key * _TILE < s_k)
        if CAUSAL:
            seen = seen & (tiles >= key)
        word = tl.load(bits + column * words + row // 32, mask=seen, other=0)
        active = active | ((word >> row % 32) & 1) << side
    masked = (active != 3) | ((first_key + 2) * _TILE > s_k)
    if CAUSAL:
        masked = masked | (tiles <= first_key + 1)
    return active, (active != 0) & masked, (active != 0) & (masked == 0)


@with_fp_fusion
@triton.jit(
    do_not_specialize=[
        "num_key_blocks", "words", "num_kv_heads", "num_pairs", "lists", "copies", "first_tile", "end_tile", "s_k",
    ]
)  # fmt: skip
def s2_attention_kernel_topk_pairs(
    bits, taken, meta, steps,
    num_key_blocks, words, num_kv_heads, num_pairs, lists, copies, first_tile, end_tile, s_k,
    PER_BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """A program writes the steps and the unordered `meta` of one pair.

    A pair has two key tiles of one KV head of one sequence. The KV head has `lists` lists, each for `copies` query
    heads. Where the steps are stored depends on which program comes first, but their order doesn't: masked ones first,
    then by member, then from the last query tile on.
    """
    program = tl.program_id(0)
    kv_head = program // num_pairs
    first_key = program % num_pairs * 2
    low = first_tile + 0
    if CAUSAL:
        low = tl.maximum(low, first_key)
    offset = tl.arange(0, AT_ONCE)
    num_masked = program * 0
    num_full = program * 0
    for number in range(0, lists):
        of_list = bits + (kv_head * lists + number).to(tl.int64) * num_key_blocks * words
        for begin in range(low, end_tile, AT_ONCE):
            tiles = begin + offset
            _, masked, full = _steps(
                of_list, first_key, tl.where(tiles < end_tile, tiles, -1), low, num_key_blocks, words, s_k,
                PER_BLOCK, CAUSAL,
            )  # fmt: skip
            num_masked += tl.sum(masked.to(tl.int32), 0) * copies
            num_full += tl.sum(full.to(tl.int32), 0) * copies

    empty = num_masked + num_full == 0
    total = tl.where(empty, 1, num_masked + num_full)
    first = tl.atomic_add(taken, total)
    base = steps + first
    # a pair that no query keeps has one step, which keeps neither tile
    first_step = tl.where(empty, first_tile << _ACTIVE_BITS, 0)
    tl.store(base, first_step, mask=empty)
    masked_before = program * 0
    full_before = num_masked
    for number in range(0, lists):
        of_list = bits + (kv_head * lists + number).to(tl.int64) * num_key_blocks * words
        masked_of_list = program * 0
        full_of_list = program * 0
        for begin in range(low, end_tile, AT_ONCE):
            tiles = begin + offset
            _, masked, full = _steps(
                of_list, first_key, tl.where(tiles < end_tile, tiles, -1), low, num_key_blocks, words, s_k,
                PER_BLOCK, CAUSAL,
            )  # fmt: skip
            masked_of_list += tl.sum(masked.to(tl.int32), 0)
            full_of_list += tl.sum(full.to(tl.int32), 0)
        masked_seen = program * 0
        full_seen = program * 0
        for begin in range(0, end_tile - low, AT_ONCE):
            tiles = end_tile - 1 - begin - offset
            active, masked, full = _steps(
                of_list, first_key, tiles, low, num_key_blocks, words, s_k, PER_BLOCK, CAUSAL
            )  # fmt: skip
            masked_place = masked_before + masked_seen + tl.cumsum(masked.to(tl.int32), 0) - 1
            full_place = full_before + full_seen + tl.cumsum(full.to(tl.int32), 0) - 1
            masked_seen += tl.sum(masked.to(tl.int32), 0)
            full_seen += tl.sum(full.to(tl.int32), 0)
            for copy in range(0, copies):
                step = (number * copies + copy) << (_ACTIVE_BITS + _QUERY_BITS) | tiles << _ACTIVE_BITS | active
                place = tl.where(masked, masked_place + copy * masked_of_list, full_place + copy * full_of_list)
                tl.store(base + place, step, mask=masked | full)
                first_step += tl.sum(tl.where((masked | full) & (place == 0), step, 0), 0)
        masked_before += copies * masked_of_list
        full_before += copies * full_of_list

    row = meta + program.to(tl.int64) * 8
    tl.store(row, kv_head % num_kv_heads)
    tl.store(row + 1, first_key)
    tl.store(row + 2, first_key + 1)
    tl.store(row + 3, first)
    tl.store(row + 4, tl.where(empty, 1, num_masked))
    tl.store(row + 5, total)
    tl.store(row + 6, first_step)
    tl.store(row + 7, kv_head // num_kv_heads)


@triton.jit
def _order_key(meta, pair, num, num_pairs, kv_heads, mean, shift, CUT: tl.constexpr):
    """Return sort keys by start of programs, and their steps.

    Programs with smaller keys start earlier.
    """
    steps = tl.load(meta + pair.to(tl.int64) * 8 + 5, mask=pair < num, other=0)
    late = tl.where(steps <= 2 * mean, shift, 0.0)
    if CUT:
        sequence = tl.load(meta + pair.to(tl.int64) * 8 + 7, mask=pair < num, other=0)
        head = sequence * kv_heads + tl.load(meta + pair.to(tl.int64) * 8, mask=pair < num, other=0)
    else:
        head = pair // num_pairs
    return head.to(tl.float32) + late, steps


@with_fp_fusion
@triton.jit(do_not_specialize=["num", "num_pairs", "num_heads", "kv_heads", "at_once"])
def s2_attention_kernel_topk_order(
    meta, ordered, slots, ordered_slots, num, num_pairs, num_heads, kv_heads, at_once, LAG: tl.constexpr,
    RANKED: tl.constexpr, COMPARED: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Order `meta` as `program_order` with one lag.

    A program counts as long if it has more than twice the mean steps. CUT: there are parts of pairs among the rows, and
    `slots` are ordered too; rows without steps don't count for the mean.
    """
    other = tl.arange(0, COMPARED)
    total = tl.zeros([COMPARED], tl.int64)
    longest = tl.zeros([COMPARED], tl.int32)
    if CUT:
        working = tl.zeros([COMPARED], tl.int32)
    for begin in range(0, num, COMPARED):
        steps = tl.load(meta + (begin + other).to(tl.int64) * 8 + 5, mask=begin + other < num, other=0)
        total += steps
        longest = tl.maximum(longest, steps)
        if CUT:
            working += (steps > 0).to(tl.int32)
    sum_of_steps = tl.sum(total, 0).to(tl.float32)
    # heads done while the longest program runs; a head's short programs start this far behind its long ones
    shift = LAG * tl.max(longest, 0).to(tl.float32) * at_once * num_heads / sum_of_steps
    shift = tl.minimum(shift, num_heads.to(tl.float32))
    mean = sum_of_steps / tl.sum(working, 0) if CUT else sum_of_steps / num

    pair = tl.program_id(0) * RANKED + tl.arange(0, RANKED)
    key, steps = _order_key(meta, pair, num, num_pairs, kv_heads, mean, shift, CUT)
    rank = tl.zeros([RANKED], tl.int32)
    for begin in range(0, num, COMPARED):
        number = begin + other
        other_key, other_steps = _order_key(meta, number, num, num_pairs, kv_heads, mean, shift, CUT)
        same = other_key[None, :] == key[:, None]
        sooner = same & (other_steps[None, :] > steps[:, None])
        sooner = sooner | (same & (other_steps[None, :] == steps[:, None]) & (number[None, :] < pair[:, None]))
        sooner = (sooner | (other_key[None, :] < key[:, None])) & (number < num)[None, :]
        rank += tl.sum(sooner.to(tl.int32), 1)
    column = tl.arange(0, 8)[None, :]
    exists = (pair < num)[:, None]
    values = tl.load(meta + pair.to(tl.int64)[:, None] * 8 + column, mask=exists, other=0)
    tl.store(ordered + rank.to(tl.int64)[:, None] * 8 + column, values, mask=exists)
    if CUT:
        tl.store(ordered_slots + rank, tl.load(slots + pair, mask=pair < num, other=0), mask=pair < num)


def topk_backward_schedule(
    layout: TopKLayout, num_kv_heads: int, s_q: int, s_k: int, query_offset: int, causal: bool, cut: bool = False
) -> BackwardSchedule:  # fmt: skip
    """Build the schedule of top-k lists, as `backward_schedule`.

    Adjacent key tiles form a pair, and every pair has space for all steps that it can have.

    Args:
        cut: cut pairs with many steps, if any pair can have that many.
    """
    per_block = layout.block_size // TILE
    first_tile, end_tile = query_offset // TILE, -(-(query_offset + s_q) // TILE)
    num_pairs = -(-s_k // (2 * TILE))
    kv_heads = layout.batch_size * num_kv_heads
    lists = layout.num_lists // num_kv_heads
    copies = layout.num_heads // layout.num_lists
    num_query_blocks, num_key_blocks = layout.num_query_blocks, layout.num_key_blocks
    words = -(-num_query_blocks // _WORD)
    num_slots = layout.indices.numel()
    num = kv_heads * num_pairs
    capacity = num + layout.kept_blocks_of_heads * per_block * max(1, per_block // 2)
    if capacity >= 2**31:
        raise ValueError(f"{capacity} steps are too many for 32-bit indices: use larger blocks")

    device, cache = layout.device, layout.compiled
    num_words = layout.batch_size * layout.num_lists * num_key_blocks * words
    longest = (end_tile - first_tile) * (layout.num_heads // num_kv_heads)
    num_parts = most_topk_slots(device, longest) if cut else 0
    num_sums = -(-num_parts // 8) * 4
    cleared = torch.zeros(4 + num_sums * SUM_COLUMNS + num_words, dtype=torch.int32, device=device)
    # each begins at a multiple of 16 bytes
    taken, sums, bits = cleared[:4], cleared[4 : len(cleared) - num_words], cleared[len(cleared) - num_words :]
    unordered = torch.empty(num, 8, dtype=torch.int32, device=device)
    steps = torch.empty(capacity, dtype=torch.int32, device=device)
    launch(
        s2_attention_kernel_topk_bits, (-(-num_slots // _SLOTS_AT_ONCE), 1, 1),
        (
            layout.indices, bits, num_slots, layout.slots, num_query_blocks, num_key_blocks, words, _SLOTS_AT_ONCE,
        ),
        cache=cache, key=("topk_bits", layout.indices.data_ptr() % 16 == 0), device=device, num_warps=4,
    )  # fmt: skip
    launch(
        s2_attention_kernel_topk_pairs, (num, 1, 1),
        (
            bits, taken, unordered, steps, num_key_blocks, words, num_kv_heads, num_pairs, lists, copies,
            first_tile, end_tile, s_k, per_block, _TILES_AT_ONCE, causal,
        ),
        cache=cache, key=("topk_backward_schedule", per_block, causal), device=device, num_warps=4,
    )  # fmt: skip
    num_tiles = end_tile - first_tile
    if num_parts == 0:
        return BackwardSchedule(in_order(unordered, kv_heads, cache), steps, first_tile, num_tiles)
    meta, parts = cut_topk_pairs(unordered, steps, taken, sums.view(-1, SUM_COLUMNS), layout, num_kv_heads, s_k)
    meta, parts = parts_in_order(meta, parts, kv_heads, num_kv_heads, cache)
    return BackwardSchedule(meta, steps, first_tile, num_tiles, parts=parts)


def in_order(meta: Tensor, num_heads: int, cache: dict[Any, Any]) -> Tensor:
    """Order `meta` [heads * pairs, 8] by the start of programs.

    The rows come ordered by head. A small number is ranked by one kernel that compares all with all; larger numbers are
    sorted.
    """
    num, device = len(meta), meta.device
    at_once = multiprocessors(device)
    if num > _MOST_RANKED:
        head = torch.arange(num, device=device) // (num // num_heads)
        return meta[_order(meta[:, 5], head, num_heads, at_once)]
    ordered = torch.empty_like(meta)
    launch(
        s2_attention_kernel_topk_order, (-(-num // _PAIRS_RANKED), 1, 1),
        (
            meta, ordered, None, None, num, num // num_heads, num_heads, None, at_once, _LAG, _PAIRS_RANKED,
            _PAIRS_COMPARED, False,
        ),
        cache=cache, key=("topk_order",), device=device, num_warps=4,
    )  # fmt: skip
    return ordered


def parts_in_order(
    meta: Tensor, parts: PairParts, num_heads: int, kv_heads: int, cache: dict[Any, Any]
) -> tuple[Tensor, PairParts]:
    """Order `meta` and its slots, as `in_order` does.

    Heads may come in any order.
    """
    num, device = len(meta), meta.device
    at_once = multiprocessors(device)
    if num > _MOST_RANKED:
        order = _order(meta[:, 5], meta[:, 7] * kv_heads + meta[:, 0], num_heads, at_once)
        return meta[order], replace(parts, slots=parts.slots[order])
    ordered, slots = torch.empty_like(meta), torch.empty_like(parts.slots)
    launch(
        s2_attention_kernel_topk_order, (-(-num // _PAIRS_RANKED), 1, 1),
        (
            meta, ordered, parts.slots, slots, num, 0, num_heads, kv_heads, at_once, _LAG, _PAIRS_RANKED,
            _PAIRS_COMPARED, True,
        ),
        cache=cache, key=("topk_order_of_parts",), device=device, num_warps=4,
    )  # fmt: skip
    return ordered, replace(parts, slots=slots)


def _order(steps: Tensor, head: Tensor, num_heads: int, at_once: int) -> Tensor:
    """Return the order of `s2_attention_kernel_topk_order`, without host waits, in torch operators."""
    total = steps.sum().float()
    shift = (_LAG * steps.max().float() * at_once * num_heads / total).clamp(max=num_heads)
    key = head.float() + torch.where(steps <= 2 * (total / (steps > 0).sum()), shift, 0.0)
    heaviest = steps.sort(descending=True, stable=True).indices
    return heaviest[key[heaviest].sort(stable=True).indices]
