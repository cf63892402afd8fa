"""Triton backward of block-sparse attention: kernels without atomics, deterministic.

With P = exp(scale * q k^T - lse), dP = do v^T and delta = rowsum(o * do) - dlse:
    dS = P * (dP - delta),  dq = scale * dS k,  dk = scale * dS^T q,  dv = P^T do.
The log-sum-exp's gradient enters only through delta, since d lse / d score = P.
dq has one kernel, dk and dv another. With `split_columns` several of its programs may share a long column; a third
kernel adds their sums.
"""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .column_parts import column_parts
from .configs import config_for, padded, shared_limit
from .forward import key_position, key_tiles, num_query_tiles, packed_tiles, pattern_stride, query_tile
from .fp_fusion import with_fp_fusion
from .part_sums import launch_of_sums, new_parts, s2_attention_bwd_kernel_add_parts
from .spec import AttentionSpec, empty, empty_bhsd
from .tiles import (
    LOG2_E,
    check_launch,
    count_below,
    load_lse,
    load_tile,
    store_tile,
    strides,
    tile_of_document,
)
from .topk_layout import Layout

_PREPROCESS_ROWS = 64


@with_fp_fusion
@triton.jit(do_not_specialize=["num_tiles", "num_heads", "s_q"])
def s2_attention_bwd_kernel_preprocess(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr,
    out_batch, out_head, out_row, dout_batch, dout_head, dout_row, num_tiles, num_heads, s_q,
    V_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr, ROWS: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """Compute delta = rowsum(o * do) - dlse.

    It is 0 for rows without keys, whatever their dlse.
    """
    program = tl.program_id(0)
    first = program % num_tiles * ROWS
    batch_head = (program // num_tiles).to(tl.int64)
    b, h = batch_head // num_heads, batch_head % num_heads
    row = first + tl.arange(0, ROWS)
    in_range = row < s_q
    out_base = out_ptr + b * out_batch + h * out_head
    dout_base = dout_ptr + b * dout_batch + h * dout_head
    out = load_tile(out_base, first, out_row, in_range, ROWS, V_DIM, PADDED_V_DIM, True)
    dout = load_tile(dout_base, first, dout_row, in_range, ROWS, V_DIM, PADDED_V_DIM, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    at = batch_head * s_q + row
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + at, mask=in_range, other=0.0)
    lse = tl.load(lse_ptr + at, mask=in_range, other=0.0)
    tl.store(delta_ptr + at, tl.where(lse == float("-inf"), 0.0, delta), mask=in_range)


@triton.jit
def _add_dq(
    dq, q, dout, lse, delta, k_base, v_base, k_stride, v_stride, key, position, num_keys, scale_log2,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr,
    STEPS: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Add one key tile's part to dq (unscaled)."""
    keys = key + tl.arange(0, STEPS)
    in_range = keys < num_keys
    k = load_tile(k_base, key, k_stride, in_range, STEPS, DIM, PADDED_DIM, MASK)
    v = load_tile(v_base, key, v_stride, in_range, STEPS, V_DIM, PADDED_V_DIM, MASK)
    weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse[:, None])
    if MASK:
        keep = in_range[None, :]
        if CAUSAL:
            keep = keep & (position[:, None] >= keys[None, :])
        weights = tl.where(keep, weights, 0.0)
    dweights = tl.dot(dout, tl.trans(v), input_precision="ieee")
    dscores = (weights * (dweights - delta[:, None])).to(k.dtype)
    return tl.dot(dscores, k, dq, input_precision="ieee")


@with_fp_fusion
@triton.jit(
    do_not_specialize=[
        "num_tiles",
        "num_heads",
        "group",
        "s_q",
        "s_k",
        "query_offset",
        "num_query_blocks",
        "pattern_stride",
    ]
)
def s2_attention_bwd_kernel_dq(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    pattern_of_head, row_offsets, row_columns, tiles,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    dout_batch, dout_head, dout_row, dq_batch, dq_head, dq_row,
    scale, scale_log2, num_tiles, num_heads, group, s_q, s_k, query_offset, num_query_blocks, pattern_stride,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A program visits the key blocks of one query tile and head."""
    batch, head, first, low, high, num_keys, query_shift, key_shift = query_tile(
        tiles, num_tiles, num_heads, s_q, s_k, query_offset, ROWS, PACKED
    )
    if first >= high:
        return
    b, h, kv = batch.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
    query_shift, key_shift = query_shift.to(tl.int64), key_shift.to(tl.int64)
    q_base = q_ptr + b * q_batch + h * q_head + query_shift * q_row
    dout_base = dout_ptr + b * dout_batch + h * dout_head + query_shift * dout_row
    k_base = k_ptr + b * k_batch + kv * k_head + key_shift * k_row
    v_base = v_ptr + b * v_batch + kv * v_head + key_shift * v_row
    position = first + tl.arange(0, ROWS)
    in_range = (position >= low) & (position < high)
    at = (b * num_heads + h) * s_q + query_shift + position
    q = load_tile(q_base, first, q_row, in_range, ROWS, DIM, PADDED_DIM, True)
    dout = load_tile(dout_base, first, dout_row, in_range, ROWS, V_DIM, PADDED_V_DIM, True)
    lse = load_lse(lse_ptr + at, in_range)
    delta = tl.load(delta_ptr + at, mask=in_range, other=0.0)

    dq = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    begin, full, stop = key_tiles(
        pattern_of_head + batch * pattern_stride, row_offsets, row_columns, num_query_blocks, head, first, num_keys,
        ROWS, STEPS, BLOCK, CAUSAL,
    )  # fmt: skip
    for tile in range(begin, full):
        key = key_position(row_columns, tile, STEPS, BLOCK)
        dq = _add_dq(
            dq, q, dout, lse, delta, k_base, v_base, k_row, v_row, key, position, num_keys, scale_log2,
            DIM, V_DIM, PADDED_DIM, PADDED_V_DIM, STEPS, CAUSAL, False,
        )  # fmt: skip
    for tile in range(full, stop):
        key = key_position(row_columns, tile, STEPS, BLOCK)
        dq = _add_dq(
            dq, q, dout, lse, delta, k_base, v_base, k_row, v_row, key, position, num_keys, scale_log2,
            DIM, V_DIM, PADDED_DIM, PADDED_V_DIM, STEPS, CAUSAL, True,
        )  # fmt: skip
    dq_base = dq_ptr + b * dq_batch + h * dq_head + query_shift * dq_row
    store_tile(dq_base, first, dq_row, in_range, dq * scale, ROWS, DIM, PADDED_DIM)


@triton.jit
def _add_dkdv(
    dk, dv, k, v, q_base, dout_base, lse_base, delta_base, q_stride, dout_stride,
    query, keys, low, high, scale_log2,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr,
    STEPS: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Add one query tile's part to dk (unscaled) and dv.

    Products are [keys, queries].
    """
    position = query + tl.arange(0, STEPS)
    in_range = (position >= low) & (position < high)
    q = load_tile(q_base, query, q_stride, in_range, STEPS, DIM, PADDED_DIM, MASK)
    lse = load_lse(lse_base + position, in_range, MASK)
    weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - lse[None, :])
    if MASK and CAUSAL:
        weights = tl.where(position[None, :] >= keys[:, None], weights, 0.0)
    dout = load_tile(dout_base, query, dout_stride, in_range, STEPS, V_DIM, PADDED_V_DIM, MASK)
    dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
    delta = tl.load(delta_base + position, mask=in_range, other=0.0) if MASK else tl.load(delta_base + position)
    dweights = tl.dot(v, tl.trans(dout), input_precision="ieee")
    dscores = (weights * (dweights - delta[None, :])).to(q.dtype)
    dk = tl.dot(dscores, q, dk, input_precision="ieee")
    return dk, dv


@with_fp_fusion
@triton.jit(
    do_not_specialize=[
        "num_tiles",
        "batch_size",
        "num_kv_heads",
        "s_q",
        "s_k",
        "query_offset",
        "num_key_blocks",
        "pattern_stride",
    ]
)
def s2_attention_bwd_kernel_dkdv(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    pattern_of_head, column_offsets, column_rows, order, tiles, parts_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    dout_batch, dout_head, dout_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    scale, scale_log2, num_tiles, batch_size, num_kv_heads, s_q, s_k, query_offset, num_key_blocks,
    pattern_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """A program owns one key tile of one KV head.

    It visits the query blocks of all heads of the group. SPLIT: it visits a part of them, and `order` has the rows of
    `ColumnParts`.
    """
    PER_BLOCK: tl.constexpr = BLOCK // STEPS
    program = tl.program_id(0)
    if PACKED:
        first, start, length = tile_of_document(tiles, program % num_tiles, ROWS)
        batch, kv_head = program // num_tiles // num_kv_heads, program // num_tiles % num_kv_heads
        low, high, num_keys, query_shift, key_shift = length * 0, length, length, start, start
    else:
        KEY_TILES: tl.constexpr = BLOCK // ROWS
        # `batch_size` sequences share one entry, or each has a separate one
        if SPLIT:
            at_row = order + program // (batch_size * KEY_TILES) * 4
            entry = tl.load(at_row)
            low_visit = tl.load(at_row + 1)
            high_visit = tl.load(at_row + 2)
            slot = tl.load(at_row + 3)
        else:
            entry = tl.load(order + program // (batch_size * KEY_TILES))
        kv_head = entry // num_key_blocks % num_kv_heads
        batch = program // KEY_TILES % batch_size + entry // num_key_blocks // num_kv_heads
        first = entry % num_key_blocks * BLOCK + program % KEY_TILES * ROWS
        low, high, num_keys = query_offset + 0, query_offset + s_q, s_k + 0
        if SPLIT:
            first = tl.where(slot == -2, num_keys, first)  # a surplus row
        query_shift, key_shift = 0 - query_offset, s_k * 0
    if first >= num_keys:
        return
    b, kv = batch.to(tl.int64), kv_head.to(tl.int64)
    query_shift, key_shift = query_shift.to(tl.int64), key_shift.to(tl.int64)
    keys = first + tl.arange(0, ROWS)
    in_range = keys < num_keys
    k_base = k_ptr + b * k_batch + kv * k_head + key_shift * k_row
    v_base = v_ptr + b * v_batch + kv * v_head + key_shift * v_row
    k = load_tile(k_base, first, k_row, in_range, ROWS, DIM, PADDED_DIM, True)
    v = load_tile(v_base, first, v_row, in_range, ROWS, V_DIM, PADDED_V_DIM, True)
    dk = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    dv = tl.zeros([ROWS, PADDED_V_DIM], tl.float32)

    j = first // BLOCK
    first_block, last_block = low // BLOCK, (high + BLOCK - 1) // BLOCK  # blocks that contain queries
    first_full, last_full = (low + BLOCK - 1) // BLOCK, high // BLOCK  # blocks full of queries
    if CAUSAL:
        first_block = tl.maximum(first_block, j)
        first_full = tl.maximum(first_full, j + 1)
    last_full = tl.maximum(last_full, first_full)
    if SPLIT:
        visited = low_visit * 0
    for member in range(GROUP):
        head = kv_head * GROUP + member
        h = head.to(tl.int64)
        q_base = q_ptr + b * q_batch + h * q_head + query_shift * q_row
        dout_base = dout_ptr + b * dout_batch + h * dout_head + query_shift * dout_row
        rows_at = (b * num_kv_heads * GROUP + h) * s_q + query_shift
        column = tl.load(pattern_of_head + batch * pattern_stride + head) * num_key_blocks + j
        begin = tl.load(column_offsets + column)
        end = tl.load(column_offsets + column + 1)
        if SPLIT:
            count = end - begin
            end = begin + tl.minimum(tl.maximum(high_visit - visited, 0), count)
            begin += tl.minimum(tl.maximum(low_visit - visited, 0), count)
            visited += count
        to_first, to_last = count_below(column_rows, begin, end, first_block, last_block, 256)
        to_first_full, to_last_full = count_below(column_rows, begin, end, first_full, last_full, 256)
        # masked tiles lie before and after the full ones; the sum's order doesn't matter, so one loop handles both
        head_begin = (begin + to_first) * PER_BLOCK
        num_head = tl.maximum(tl.minimum(to_first_full, to_last) - to_first, 0) * PER_BLOCK
        if CAUSAL and STEPS < BLOCK:
            # in the diagonal block, only tiles that end at or after the first key
            nearest = tl.load(column_rows + begin + to_first, mask=num_head > 0, other=-1)
            skipped = tl.where(nearest == j, first % BLOCK // STEPS, 0)
            head_begin += skipped
            num_head -= skipped
        tail_begin = (begin + to_last_full) * PER_BLOCK
        num_tail = tl.maximum(to_last - to_last_full, 0) * PER_BLOCK
        for tile in range((begin + to_first_full) * PER_BLOCK, (begin + to_last_full) * PER_BLOCK):
            query = key_position(column_rows, tile, STEPS, BLOCK)
            dk, dv = _add_dkdv(
                dk, dv, k, v, q_base, dout_base, lse_ptr + rows_at, delta_ptr + rows_at, q_row, dout_row,
                query, keys, low, high, scale_log2,
                DIM, V_DIM, PADDED_DIM, PADDED_V_DIM, STEPS, CAUSAL, False,
            )  # fmt: skip
        for masked in range(0, num_head + num_tail):
            tile = tl.where(masked < num_head, head_begin + masked, tail_begin + masked - num_head)
            query = key_position(column_rows, tile, STEPS, BLOCK)
            dk, dv = _add_dkdv(
                dk, dv, k, v, q_base, dout_base, lse_ptr + rows_at, delta_ptr + rows_at, q_row, dout_row,
                query, keys, low, high, scale_log2,
                DIM, V_DIM, PADDED_DIM, PADDED_V_DIM, STEPS, CAUSAL, True,
            )  # fmt: skip

    if SPLIT:
        if slot >= 0:
            place = (slot.to(tl.int64) * batch_size + program // (BLOCK // ROWS) % batch_size) * (BLOCK // ROWS)
            part = parts_ptr + (place + program % (BLOCK // ROWS)) * (ROWS * (DIM + V_DIM))
            store_tile(part, first * 0, DIM, in_range, dk, ROWS, DIM, PADDED_DIM)
            store_tile(part + ROWS * DIM, first * 0, V_DIM, in_range, dv, ROWS, V_DIM, PADDED_V_DIM)
        in_range = in_range & (slot < 0)
    dk_base = dk_ptr + b * dk_batch + kv * dk_head + key_shift * dk_row
    dv_base = dv_ptr + b * dv_batch + kv * dv_head + key_shift * dv_row
    store_tile(dk_base, first, dk_row, in_range, dk * scale, ROWS, DIM, PADDED_DIM)
    store_tile(dv_base, first, dv_row, in_range, dv, ROWS, V_DIM, PADDED_V_DIM)


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
    layout: Layout, spec: AttentionSpec,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute gradients of q, k and v.

    Inputs are views [b, h, s, d]; gradients are contiguous in `spec.format`. Takes the arguments of `forward`, its
    results and their gradients; a `dlse` of None counts as 0. Results are the same in every run.
    """
    batch, num_heads, s_q, dim = q.shape
    num_kv_heads, s_k, v_dim = v.shape[1:]
    block = layout.block_size
    dims = {"DIM": dim, "V_DIM": v_dim, "PADDED_DIM": padded(dim), "PADDED_V_DIM": padded(v_dim)}
    limit = shared_limit(q.device)
    dq = empty_bhsd((batch, num_heads, s_q, dim), q, spec.format)
    dk = empty_bhsd((batch, num_kv_heads, s_k, dim), q, spec.format)
    dv = empty_bhsd((batch, num_kv_heads, s_k, v_dim), q, spec.format)
    delta = empty((batch, num_heads, s_q), torch.float32, q.device)
    packed = spec.cu_seqlens is not None

    with torch.cuda.device_of(q):
        if q.numel() > 0:
            num_tiles = -(-s_q // _PREPROCESS_ROWS)
            s2_attention_bwd_kernel_preprocess[(batch * num_heads * num_tiles,)](
                out, dout, lse, dlse, delta, *strides(out), *strides(dout), num_tiles, num_heads, s_q,
                V_DIM=v_dim, PADDED_V_DIM=padded(v_dim), ROWS=_PREPROCESS_ROWS, HAS_DLSE=dlse is not None,
            )  # fmt: skip
            config = config_for("dq", block, dim, v_dim, q.dtype, limit)
            tiles = packed_tiles(spec, layout, s_q, config.rows)
            num_tiles = num_query_tiles(s_q, spec.query_offset, config.rows) if tiles is None else len(tiles)
            programs = batch * num_heads * num_tiles
            check_launch(programs, layout.row_columns.numel(), block // config.steps)
            s2_attention_bwd_kernel_dq[(programs,)](
                q, k, v, dout, lse, delta, dq,
                layout.pattern_of_head, layout.row_offsets, layout.row_columns, tiles,
                *strides(q), *strides(k), *strides(v), *strides(dout), *strides(dq),
                spec.softmax_scale, spec.softmax_scale * LOG2_E, num_tiles, num_heads,
                num_heads // num_kv_heads, s_q, s_k, spec.query_offset, layout.num_query_blocks, pattern_stride(layout),
                **dims, BLOCK=block, ROWS=config.rows, STEPS=config.steps,
                CAUSAL=spec.causal, PACKED=packed,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
        if k.numel() > 0:
            config = config_for("dkdv", block, dim, v_dim, q.dtype, limit)
            tiles = packed_tiles(spec, layout, s_k, config.rows)
            sequences, key_tiles = batch // layout.batch_size, block // config.rows
            split = None
            if spec.split_columns and not packed:
                split = column_parts(layout, num_kv_heads, sequences, config.rows)
            parts = None if split is None else new_parts(
                split.slots, sequences, key_tiles, config.rows, dim, v_dim, q.device
            )  # fmt: skip
            order = layout.columns_by_work(num_kv_heads) if split is None else split.rows
            per_head = layout.num_key_blocks * key_tiles if tiles is None else len(tiles)
            programs = batch * num_kv_heads * per_head if split is None else len(order) * sequences * key_tiles
            check_launch(programs, layout.column_rows.numel(), block // config.steps)
            s2_attention_bwd_kernel_dkdv[(programs,)](
                q, k, v, dout, lse, delta, dk, dv,
                layout.pattern_of_head, layout.column_offsets, layout.column_rows, order, tiles, parts,
                *strides(q), *strides(k), *strides(v), *strides(dout), *strides(dk), *strides(dv),
                spec.softmax_scale, spec.softmax_scale * LOG2_E, per_head, sequences,
                num_kv_heads, s_q, s_k, spec.query_offset, layout.num_key_blocks, pattern_stride(layout),
                GROUP=num_heads // num_kv_heads, **dims, BLOCK=block, ROWS=config.rows, STEPS=config.steps,
                CAUSAL=spec.causal, PACKED=packed, SPLIT=split is not None,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
            if split is not None:
                assert parts is not None
                programs, arguments = launch_of_sums(parts, split.sums, dk, dv, spec.softmax_scale, config.rows)
                s2_attention_bwd_kernel_add_parts[(programs,)](*arguments, num_warps=4)
    return dq, dk, dv
