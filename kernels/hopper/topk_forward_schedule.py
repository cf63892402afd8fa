"""Forward schedule of top-k lists on Hopper: one launch, no host reads.

Nothing is sorted.
"""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fp_fusion import with_fp_fusion
from ..launch import launch
from ..topk_layout import TopKLayout
from .forward_schedule import TILE, ForwardSchedule

MAX_SLOTS = 2048  # per list: a program compares all candidates of a tile with each other
_PAIRS_AT_ONCE = 8192  # candidate comparisons at once: limited by registers


@triton.jit
def _candidates(
    indices, index, list_number, tile, slots, num_query_blocks, num_key_blocks, end,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Return chunk, half of the tile, and visibility of candidates `index`.

    The half is the one that lists the chunk.
    """
    half = index // (SLOTS * PARTS)
    slot = index // PARTS % SLOTS
    row = tile * ROWS // PARTS + half
    exists = (slot < slots) & (row < num_query_blocks)
    at = (list_number.to(tl.int64) * num_query_blocks + row) * slots + slot
    column = tl.load(indices + at, mask=exists, other=-1)
    chunk = column * PARTS + index % PARTS
    # a tile's rows are those of chunk `tile`, or of chunks 2 * tile and 2 * tile + 1
    seen = (column >= 0) & (column < num_key_blocks) & (chunk < end)
    if CAUSAL:
        seen = seen & (chunk <= tile * ROWS + half)
    return chunk, half, seen


@triton.jit
def _needs_mask(chunk, flags, tile, tail, ROWS: tl.constexpr, CAUSAL: tl.constexpr):
    """Return whether a chunk is partly masked for a tile.

    True if some row of the tile does not see all of the chunk.
    """
    masked = (flags != 3) | (chunk >= tail)
    if CAUSAL:
        masked = masked | (chunk >= tile * ROWS)
    return masked


@with_fp_fusion
@triton.jit(
    do_not_specialize=[
        "slots",
        "num_query_blocks",
        "num_key_blocks",
        "num_tiles",
        "num_heads",
        "end",
        "tail",
        "capacity",
        "group",
    ]
)
def s2_attention_kernel_topk_steps(
    indices, head_order, head_slot, step_offsets, full_offsets, chunks,
    slots, num_query_blocks, num_key_blocks, num_tiles, num_heads, end, tail, capacity, group,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, AT_ONCE: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """A program builds the steps of one tile of one list.

    The first program of a list also places its heads. ROWS: query blocks per tile. PARTS: chunks per key block. `end`:
    number of chunks that hold keys. `tail`: the first chunk that reaches beyond the last key. Among equal chunks the
    first candidate counts, with the flags of all.
    """
    CANDIDATES: tl.constexpr = SLOTS * ROWS * PARTS
    program = tl.program_id(0)
    list_number = program // num_tiles
    tile = program % num_tiles
    index = tl.arange(0, CANDIDATES)
    chunk, half, seen = _candidates(
        indices, index, list_number, tile, slots, num_query_blocks, num_key_blocks, end, SLOTS, ROWS, PARTS, CAUSAL
    )
    named_by = tl.zeros([CANDIDATES], tl.int32)
    earlier = tl.zeros([CANDIDATES], tl.int32)
    masked_after = tl.zeros([CANDIDATES], tl.int32)
    full_after = tl.zeros([CANDIDATES], tl.int32)
    num_masked = program * 0
    num_full = program * 0
    for begin in range(0, CANDIDATES, AT_ONCE):
        other = begin + tl.arange(0, AT_ONCE)
        other_chunk, other_half, other_seen = _candidates(
            indices, other, list_number, tile, slots, num_query_blocks, num_key_blocks, end,
            SLOTS, ROWS, PARTS, CAUSAL,
        )  # fmt: skip
        both = seen[:, None] & other_seen[None, :]
        same = both & (chunk[:, None] == other_chunk[None, :])
        earlier += tl.sum((same & (other[None, :] < index[:, None])).to(tl.int32), 1)
        other_flags = tl.full([AT_ONCE], 3, tl.int32)
        if ROWS == 2:
            bits = tl.where(same, 1 << other_half[None, :], 0)
            named_by = named_by | (tl.max(bits & 1, 1) | tl.max(bits & 2, 1))
            bits = tl.where(same, 1 << half[:, None], 0)
            other_flags = tl.max(bits & 1, 0) | tl.max(bits & 2, 0)
        first = other_seen & (tl.sum((same & (index[:, None] < other[None, :])).to(tl.int32), 0) == 0)
        other_masked = _needs_mask(other_chunk, other_flags, tile, tail, ROWS, CAUSAL)
        after = (first[None, :] & (other_chunk[None, :] > chunk[:, None])).to(tl.int32)
        masked_after += tl.sum(tl.where(other_masked[None, :], after, 0), 1)
        full_after += tl.sum(tl.where(other_masked[None, :], 0, after), 1)
        num_masked += tl.sum((first & other_masked).to(tl.int32), 0)
        num_full += tl.sum((first & (other_masked == 0)).to(tl.int32), 0)
    flags = named_by if ROWS == 2 else tl.full([CANDIDATES], 3, tl.int32)
    masked = _needs_mask(chunk, flags, tile, tail, ROWS, CAUSAL)

    # masked chunks, padding, full chunks: both kinds from the last key to the first
    kept = num_masked + num_full
    steps = tl.maximum((kept + ROWS - 1) // ROWS, 1)
    padding = steps * ROWS - kept
    base = chunks + program.to(tl.int64) * capacity * ROWS
    place = tl.where(masked, masked_after, num_masked + padding + full_after)
    tl.store(base + place, (chunk << 2) | flags, mask=seen & (earlier == 0))
    spare = tl.arange(0, 2)
    tl.store(base + num_masked + spare, spare * 0 + (num_key_blocks * PARTS << 2), mask=spare < padding)
    begin = program * capacity
    tl.store(step_offsets + program * 2, begin)
    tl.store(step_offsets + program * 2 + 1, begin + steps)
    masked_steps = tl.maximum((num_masked + padding + ROWS - 1) // ROWS, 1)
    tl.store(full_offsets + program, begin + masked_steps)
    if tile == 0:
        for member in range(0, group):
            at = list_number * group + member
            tl.store(head_order + at, at % num_heads)
            tl.store(head_slot + at, list_number)


def topk_forward_schedule(layout: TopKLayout, *, causal: bool, s_k: int) -> ForwardSchedule:
    """Build the steps over `s_k` keys; heads keep their order.

    Every tile has space for everything that its lists can name.
    """
    size = min(layout.block_size, TILE)
    rows, parts = max(1, TILE // layout.block_size), max(1, layout.block_size // TILE)
    num_tiles = -(-layout.num_query_blocks // rows) * parts
    num_lists = layout.batch_size * layout.num_lists
    slots = triton.next_power_of_2(layout.slots)
    candidates = slots * rows * parts
    at_once = max(1, min(candidates, _PAIRS_AT_ONCE // candidates))
    capacity = max(1, min(layout.slots * parts, layout.num_key_blocks * parts))
    if rows == 2:  # two lists' chunks, two to a step
        capacity = max(1, min(layout.slots, -(-layout.num_key_blocks // 2)))
    programs = num_lists * num_tiles
    if programs * capacity * rows >= 2**31 - 2**16:
        raise ValueError(f"{programs * capacity * rows} chunks are too many for 32-bit indices: use larger blocks")

    def table(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=layout.device)

    of_heads = (layout.batch_size, layout.num_heads)
    schedule = ForwardSchedule(
        size, num_tiles, table(*of_heads), table(*of_heads), table(programs, 2), table(programs),
        table(programs * capacity * rows),
    )  # fmt: skip
    constants = (slots, rows, parts, at_once, causal)
    launch(
        s2_attention_kernel_topk_steps, (programs, 1, 1),
        (
            layout.indices, schedule.head_order, schedule.head_slot, schedule.step_offsets, schedule.full_offsets,
            schedule.chunks, layout.slots, layout.num_query_blocks, layout.num_key_blocks, num_tiles, layout.num_heads,
            -(-s_k // size), s_k // size, capacity, layout.num_heads // layout.num_lists, *constants,
        ),
        cache=layout.compiled, key=("topk_forward_schedule", *constants, layout.indices.data_ptr() % 16 == 0),
        device=layout.device, num_warps=4,
    )  # fmt: skip
    return schedule
