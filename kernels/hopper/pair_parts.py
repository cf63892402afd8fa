"""Cut pairs of key tiles with many steps into parts.

Several programs compute the parts of a pair. A part is a row of `meta` with the pair's key tiles and a range of its
steps, whose list stays as it is. Static pairs are cut by torch operators, those of top-k lists by one kernel without
host reads.
"""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..column_parts import LEAST_ROWS, SUM_COLUMNS, cut_columns, most_slots, trimmed
from ..configs import multiprocessors
from ..fp_fusion import with_fp_fusion
from ..launch import launch
from ..topk_layout import TopKLayout

TILE = 64
LEAST_STEPS = LEAST_ROWS // TILE  # a pair with fewer stays whole
_AT_ONCE = 256
_TILE = tl.constexpr(TILE)
_SUM_COLUMNS = tl.constexpr(SUM_COLUMNS)


@dataclass(frozen=True)
class PairParts:
    """Where programs put dk and dv sums, and what to add afterwards.

    - ``slots`` int32 [programs]: slot of the program's sums; -1: it stores dk and dv itself.
    - ``sums`` int32 [n, 6]: as in `ColumnParts`.
    """

    slots: Tensor
    sums: Tensor
    num_slots: int


def may_cut(most_steps: int) -> bool:
    """Return whether `cut_pairs` may cut pairs of at most so many steps."""
    return most_steps > LEAST_STEPS


def cut_pairs(meta: Tensor, steps: Tensor, copies: int, device: torch.device) -> tuple[Tensor, PairParts] | None:
    """Cut the heavy pairs of `meta` (int64).

    Returns None if there are none. Reads the device.

    Args:
        copies: sequences that share each pair.
        device: runs the programs; the tensors may lie elsewhere.
    """
    at_once = multiprocessors(device)
    if most_slots(copies, at_once) < 2:
        return None
    cut = trimmed(cut_columns(meta[:, 5].long(), LEAST_STEPS, copies, at_once))
    if cut is None:
        return None
    parts = meta[cut.column]
    parts[:, 3] += cut.low
    parts[:, 5] = cut.high - cut.low
    parts[:, 4] = torch.minimum((parts[:, 4] - cut.low).clamp(min=0), parts[:, 5])
    parts[:, 6] = steps[parts[:, 3]].to(parts.dtype)
    heavy = meta[cut.heavy]
    key = heavy[:, 1:3] * TILE
    columns = (cut.first_slot, cut.count, heavy[:, 0], heavy[:, 7], key[:, 0], key[:, 1] - key[:, 0])
    return parts, PairParts(cut.slot.int(), torch.stack(columns, 1).int(), cut.slots)


@triton.jit
def _counts(meta, rows, num, limit):
    """Return the steps of pairs, and how many slots each needs."""
    steps = tl.load(meta + rows.to(tl.int64) * 8 + 5, mask=rows < num, other=0)
    return steps, tl.where(steps > limit, 2 * steps // limit, 0)


@with_fp_fusion
@triton.jit(do_not_specialize=["num", "extra", "at_once", "least", "num_kv_heads", "last_sequence", "beyond"])
def s2_attention_kernel_topk_cut(
    meta, steps, taken, parts, slots, sums, num, extra, at_once, least, num_kv_heads, last_sequence, beyond,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Copy pairs to `parts`, heavy ones in parts, as `cut_pairs`.

    A pair's first part keeps its place; the others follow all `num` pairs, in order. Of the `extra` rows there, the
    surplus ones have no step, and key tiles beyond the last key. Programs after those of the pairs write these.
    """
    block = tl.program_id(0)
    blocks = (num + AT_ONCE - 1) // AT_ONCE
    row = tl.arange(0, AT_ONCE)
    total = tl.load(taken).to(tl.int64)
    limit = tl.maximum((3 * total + 4 * at_once - 1) // (4 * at_once), least).to(tl.int32)
    slots_before = block * 0
    heavy_before = block * 0
    for begin in range(0, tl.minimum(block, blocks) * AT_ONCE, AT_ONCE):
        _, count = _counts(meta, begin + row, num, limit)
        slots_before += tl.sum(count, 0)
        heavy_before += tl.sum((count > 0).to(tl.int32), 0)
    if block >= blocks:
        surplus = (block - blocks) * AT_ONCE + row
        exists = (surplus >= slots_before - heavy_before) & (surplus < extra)
        to = parts + (num + surplus).to(tl.int64) * 8
        nothing = row * 0
        tl.store(to, nothing + num_kv_heads - 1, mask=exists)
        tl.store(to + 1, nothing + beyond, mask=exists)
        tl.store(to + 2, nothing + beyond, mask=exists)
        tl.store(to + 3, nothing, mask=exists)
        tl.store(to + 4, nothing, mask=exists)
        tl.store(to + 5, nothing, mask=exists)
        tl.store(to + 6, nothing, mask=exists)
        tl.store(to + 7, nothing + last_sequence, mask=exists)
        tl.store(slots + num + surplus, nothing - 1, mask=exists)
        return
    pair = block * AT_ONCE + row
    exists = pair < num
    num_steps, count = _counts(meta, pair, num, limit)
    is_heavy = count > 0
    first_slot = slots_before + tl.cumsum(count, 0) - count
    number = heavy_before + tl.cumsum(is_heavy.to(tl.int32), 0) - is_heavy.to(tl.int32)
    source = meta + pair.to(tl.int64) * 8
    kv_head = tl.load(source, mask=exists, other=0)
    first_tile = tl.load(source + 1, mask=exists, other=0)
    second_tile = tl.load(source + 2, mask=exists, other=0)
    first_step = tl.load(source + 3, mask=exists, other=0)
    num_masked = tl.load(source + 4, mask=exists, other=0)
    sequence = tl.load(source + 7, mask=exists, other=0)
    of_sum = sums + number * _SUM_COLUMNS
    tl.store(of_sum, first_slot, mask=is_heavy)
    tl.store(of_sum + 1, count, mask=is_heavy)
    tl.store(of_sum + 2, kv_head, mask=is_heavy)
    tl.store(of_sum + 3, sequence, mask=is_heavy)
    tl.store(of_sum + 4, first_tile * _TILE, mask=is_heavy)
    tl.store(of_sum + 5, (second_tile - first_tile) * _TILE, mask=is_heavy)
    whole = tl.maximum(count, 1)
    work = num_steps.to(tl.int64)
    for part in range(0, tl.max(whole, 0)):
        low = (part * work // whole).to(tl.int32)
        high = ((part + 1) * work // whole).to(tl.int32)
        here = exists & (part < whole)
        place = tl.where(row * 0 + part == 0, pair, num + first_slot - number + part - 1)
        to = parts + place.to(tl.int64) * 8
        tl.store(to, kv_head, mask=here)
        tl.store(to + 1, first_tile, mask=here)
        tl.store(to + 2, second_tile, mask=here)
        tl.store(to + 3, first_step + low, mask=here)
        tl.store(to + 4, tl.minimum(tl.maximum(num_masked - low, 0), high - low), mask=here)
        tl.store(to + 5, high - low, mask=here)
        tl.store(to + 6, tl.load(steps + first_step + low, mask=here, other=0), mask=here)
        tl.store(to + 7, sequence, mask=here)
        tl.store(slots + place, tl.where(is_heavy, first_slot + part, -1), mask=here)


def most_topk_slots(device: torch.device, steps: int) -> int:
    """Return the maximum number of slots that top-k lists need.

    No pair has more than `steps` steps.
    """
    return most_slots(1, multiprocessors(device)) if steps > LEAST_STEPS else 0


def cut_topk_pairs(
    meta: Tensor, steps: Tensor, taken: Tensor, sums: Tensor, layout: TopKLayout, num_kv_heads: int, s_k: int
) -> tuple[Tensor, PairParts]:
    """Cut the heavy pairs of top-k lists; the host reads nothing.

    Args:
        meta: int32 [pairs, 8], ordered by sequence and KV head.
        taken: int32, the number of steps first.
        sums: int32 [slots // 2 or more, 6], of zeros.
    """
    num, device = len(meta), meta.device
    num_slots = most_slots(1, multiprocessors(device))
    parts = torch.empty(num + num_slots, 8, dtype=torch.int32, device=device)
    slots = torch.empty(num + num_slots, dtype=torch.int32, device=device)
    blocks = -(-num // _AT_ONCE) + -(-num_slots // _AT_ONCE)
    launch(
        s2_attention_kernel_topk_cut, (blocks, 1, 1),
        (
            meta, steps, taken, parts, slots, sums, num, num_slots, multiprocessors(device), LEAST_STEPS, num_kv_heads,
            layout.batch_size - 1, -(-s_k // (2 * TILE)) * 2, _AT_ONCE,
        ),
        cache=layout.compiled, key=("topk_cut",), device=device, num_warps=4,
    )  # fmt: skip
    return parts, PairParts(slots, sums, num_slots)
