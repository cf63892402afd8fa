"""Triton decoding: one query per sequence, split over kept keys.

A program handles one sequence, up to 16 query heads of one KV head (the rows of a matrix product), and one part of the
keys that any of these heads keeps. Parts are merged by their log-sum-exp. The number of keys is read on the device: a
launch depends only on shapes, so it can be captured in a CUDA graph and replayed at other positions.
"""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

import os
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import padded, shared_limit
from ..fp_fusion import with_fp_fusion
from ..interpreter import repair_interpreter
from ..layout import BlockLayout
from ..spec import empty
from ..tiles import LOG2_E, last_contiguous
from .schedule import HEADS_PER_TILE, DecodeSchedule, decode_schedule, tiles_of_group

if os.environ.get("TRITON_INTERPRET") == "1":
    repair_interpreter()

_LN_2 = tl.constexpr(0.6931471805599453)
_MOST_SPLITS = 128  # parts that one program merges
_RESIDENT = 3  # programs that fit in a Hopper multiprocessor's shared memory at once
_ROUNDS = 4  # waves of programs when there are many keys, so that a partly filled last wave matters little
_LEAST_STEPS = 8  # steps of a program when there are several waves: its writes stay small compared with its reads
_INTERPRETER_PROGRAMS = 8


@triton.jit
def _slots(
    first, begin, num_slots, position, n_k, columns, bits_ptr, table_row,
    PAGE: tl.constexpr, STEPS: tl.constexpr, DENSE: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """Return STEPS slots: whether visible, page row, which heads keep them.

    Slots count the schedule's keys, not the sequence's. A tile may span several pages or a part of one.
    """
    slot = first + tl.arange(0, STEPS)
    entry, offset = slot // PAGE, slot % PAGE
    in_list = slot < num_slots
    column = entry if DENSE else tl.load(columns + begin + entry, mask=in_list, other=0)
    seen = in_list & (column * PAGE + offset <= position) & (column < n_k)
    page = tl.load(table_row + column, mask=seen, other=-1)
    bits = column if UNIFORM else tl.load(bits_ptr + begin + entry, mask=in_list, other=0)
    return seen & (page >= 0), page.to(tl.int64) * PAGE + offset, bits


@with_fp_fusion
@triton.jit(do_not_specialize=["group", "num_heads", "n_q", "n_k", "num_splits"])
def s2_decode_kernel(
    q_ptr, keys_ptr, values_ptr, table_ptr, positions_ptr, list_of_tile, offsets, columns, bits_ptr,
    part_ptr, part_lse_ptr,
    q_batch, q_head, table_batch, table_head, scale_log2, group, num_heads, n_q, n_k, num_splits,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr,
    PAGE: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, DENSE: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    split, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles_of_group = (group + ROWS - 1) // ROWS
    kv = tile // tiles_of_group
    in_group = tile % tiles_of_group * ROWS + tl.arange(0, ROWS)
    is_head = in_group < group
    head = (kv * group + in_group).to(tl.int64)
    dims, v_dims = tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_V_DIM)
    q_at = q_ptr + b.to(tl.int64) * q_batch + head[:, None] * q_head + dims[None, :]
    q = tl.load(q_at, mask=is_head[:, None] & (dims < DIM)[None, :], other=0.0)

    position = tl.load(positions_ptr + b)
    # at position -1 (no query) the program visits the first row and masks all its keys
    query_block = tl.minimum(tl.maximum(position, 0) // PAGE, n_q - 1)
    if DENSE:
        begin = query_block * 0
        count = query_block + 1
    else:
        row = tl.load(list_of_tile + tile) * n_q + query_block
        begin = tl.load(offsets + row)
        count = tl.load(offsets + row + 1) - begin
    num_slots = count * PAGE
    num_tiles = (num_slots + STEPS - 1) // STEPS
    share = (num_tiles + num_splits - 1) // num_splits
    first = tl.minimum(split * share, num_tiles)
    last = tl.minimum(first + share, num_tiles)
    table_row = table_ptr + b.to(tl.int64) * table_batch + kv.to(tl.int64) * table_head

    acc = tl.zeros([ROWS, PADDED_V_DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    seen, key_row, bits = _slots(
        first * STEPS, begin, num_slots, position, n_k, columns, bits_ptr, table_row, PAGE, STEPS, DENSE, UNIFORM
    )
    for step in range(first, last):
        # A tile's pages are looked up one step ahead. Triton prefetches keys and values several steps ahead (as its
        # use of shared memory shows) only if their addresses come from no load in the same step.
        next_seen, next_key_row, next_bits = _slots(
            (step + 1) * STEPS, begin, num_slots, position, n_k, columns, bits_ptr, table_row,
            PAGE, STEPS, DENSE, UNIFORM,
        )  # fmt: skip
        k_at = keys_ptr + key_row[:, None] * DIM + dims[None, :]
        k = tl.load(k_at, mask=seen[:, None] & (dims < DIM)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        keep = seen[None, :] & is_head[:, None]
        if not UNIFORM:
            keep = keep & (((bits[None, :] >> tl.arange(0, ROWS)[:, None]) & 1) != 0)
        scores = tl.where(keep, scores * scale_log2, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(weights, 1)
        v_at = values_ptr + key_row[:, None] * V_DIM + v_dims[None, :]
        v = tl.load(v_at, mask=seen[:, None] & (v_dims < V_DIM)[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        peak, seen, key_row, bits = new_peak, next_seen, next_key_row, next_bits

    safe_total = tl.where(total == 0.0, 1.0, total)
    out_row = (b.to(tl.int64) * num_heads + head) * num_splits + split
    lse = tl.where(total == 0.0, float("-inf"), peak + tl.log2(safe_total))
    tl.store(part_lse_ptr + out_row, lse, mask=is_head)
    out_at = part_ptr + out_row[:, None] * V_DIM + v_dims[None, :]
    tl.store(out_at, acc / safe_total[:, None], mask=is_head[:, None] & (v_dims < V_DIM)[None, :])


@with_fp_fusion
@triton.jit(do_not_specialize=["num_splits"])
def s2_decode_merge_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, num_splits,
    V_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr, PADDED_SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    splits, dims = tl.arange(0, PADDED_SPLITS), tl.arange(0, PADDED_V_DIM)
    is_split = splits < num_splits
    lse = tl.load(part_lse_ptr + row * num_splits + splits, mask=is_split, other=float("-inf"))
    peak = tl.max(lse, 0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(lse - shift)
    total = tl.sum(weights, 0)
    safe_total = tl.where(total == 0.0, 1.0, total)
    part_at = part_ptr + (row * num_splits + splits[:, None]) * V_DIM + dims[None, :]
    part = tl.load(part_at, mask=is_split[:, None] & (dims < V_DIM)[None, :], other=0.0)
    out = tl.sum(part * weights[:, None], 0) / safe_total
    tl.store(out_ptr + row * V_DIM + dims, out.to(out_ptr.dtype.element_ty), mask=dims < V_DIM)
    tl.store(lse_ptr + row, tl.where(total == 0.0, float("-inf"), (shift + tl.log2(safe_total)) * _LN_2))


@with_fp_fusion
@triton.jit
def s2_append_kernel(
    k_ptr, v_ptr, keys_ptr, values_ptr, table_ptr, positions_ptr,
    k_batch, k_head, v_batch, v_head, table_batch, table_head,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    kv, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    position = tl.load(positions_ptr + b)
    if position >= 0:
        page = tl.load(table_ptr + b * table_batch + kv * table_head + position // PAGE)
        if page >= 0:
            row = page.to(tl.int64) * PAGE + position % PAGE
            dims, v_dims = tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_V_DIM)
            k = tl.load(k_ptr + b * k_batch + kv * k_head + dims, mask=dims < DIM)
            tl.store(keys_ptr + row * DIM + dims, k, mask=dims < DIM)
            v = tl.load(v_ptr + b * v_batch + kv * v_head + v_dims, mask=v_dims < V_DIM)
            tl.store(values_ptr + row * V_DIM + v_dims, v, mask=v_dims < V_DIM)


def triton_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    positions: Tensor,
    layout: BlockLayout | None,
    softmax_scale: float,
    num_splits: int | None,
) -> tuple[Tensor, Tensor]:
    """Compute output [b, H, d_v] and log-sum-exp float32 [b, H].

    Arguments are those of `block_sparse_decode`.
    """
    q = last_contiguous(q)
    batch, num_heads, dim = q.shape
    num_kv_heads, n_k = table.shape[1:]
    block_size, v_dim = values.shape[1:]
    group = num_heads // num_kv_heads
    schedule = None if layout is None else decode_schedule(layout, num_kv_heads)
    tiles = num_kv_heads * tiles_of_group(group)
    num_rows = n_k if layout is None else layout.num_query_blocks
    steps, stages = tile_sizes(dim, v_dim, q.dtype, shared_limit(q.device))
    if num_splits is None:
        longest = n_k if schedule is None else schedule.longest
        num_splits = _splits(batch * tiles, -(-longest * block_size // steps), q.device)
    out = empty((batch, num_heads, v_dim), q.dtype, q.device)
    lse = empty((batch, num_heads), torch.float32, q.device)
    if out.numel() == 0:
        return out, lse
    part = empty((batch, num_heads, num_splits, v_dim), torch.float32, q.device)
    part_lse = empty((batch, num_heads, num_splits), torch.float32, q.device)
    with torch.cuda.device_of(q):
        s2_decode_kernel[(num_splits, tiles, batch)](
            q, keys, values, table, positions, *_schedule_tensors(schedule), part, part_lse,
            q.stride(0), q.stride(1), table.stride(0), table.stride(1),
            softmax_scale * LOG2_E, group, num_heads, num_rows, n_k, num_splits,
            DIM=dim, V_DIM=v_dim, PADDED_DIM=padded(dim), PADDED_V_DIM=padded(v_dim),
            PAGE=block_size, ROWS=HEADS_PER_TILE, STEPS=steps, DENSE=schedule is None,
            UNIFORM=schedule is None or schedule.bits is None, num_warps=4, num_stages=stages,
        )  # fmt: skip
        s2_decode_merge_kernel[(batch * num_heads,)](
            part, part_lse, out, lse, num_splits,
            V_DIM=v_dim, PADDED_V_DIM=padded(v_dim), PADDED_SPLITS=triton.next_power_of_2(num_splits), num_warps=4,
        )  # fmt: skip
    return out, lse


def triton_append(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, table: Tensor, positions: Tensor) -> None:
    """Write the new token's keys and values in one launch, as `pages.write_token`."""
    k, v = last_contiguous(k), last_contiguous(v)
    batch, num_kv_heads, dim = k.shape
    block_size, v_dim = values.shape[1:]
    with torch.cuda.device_of(k):
        s2_append_kernel[(num_kv_heads, batch)](
            k, v, keys, values, table, positions,
            k.stride(0), k.stride(1), v.stride(0), v.stride(1), table.stride(0), table.stride(1),
            DIM=dim, V_DIM=v_dim, PADDED_DIM=padded(dim), PADDED_V_DIM=padded(v_dim), PAGE=block_size, num_warps=1,
        )  # fmt: skip


def _schedule_tensors(schedule: DecodeSchedule | None) -> tuple[Tensor | None, ...]:
    if schedule is None:
        return (None,) * 4
    return schedule.list_of_tile, schedule.offsets, schedule.columns, schedule.bits


@cache
def tile_sizes(dim: int, v_dim: int, dtype: torch.dtype, limit: int | None) -> tuple[int, int]:
    """Return keys per step and pipeline stages that fit in shared memory."""
    width = padded(dim) + padded(v_dim)
    steps = 64 if dtype.itemsize * width <= 512 else 32
    if dtype == torch.float32:
        steps = 16  # full-precision products run on the CUDA cores, from registers
    stages = 3
    while limit is not None and stages > 1 and stages * steps * width * dtype.itemsize + 8192 > limit:
        stages -= 1
    return steps, stages


def _splits(tiles: int, steps: int, device: torch.device) -> int:
    """Return the number of parts for up to `steps` steps.

    All tiles together fill the device once, or in several waves if there are many keys.
    """
    programs = _INTERPRETER_PROGRAMS
    if device.type == "cuda":
        programs = _RESIDENT * _processors(torch.cuda.current_device() if device.index is None else device.index)
    once = min(-(-programs // tiles), steps)
    often = min(-(-programs * _ROUNDS // tiles), steps // _LEAST_STEPS)
    return max(1, min(max(once, often), _MOST_SPLITS))


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
