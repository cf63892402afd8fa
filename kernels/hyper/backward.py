"""Triton backward of HyperAttention: samples and buckets, without atomics.

With the log-sum-exp and delta = rowsum(o * do) - dlse of the merged output, parts are independent: each adds
dS = P * (dP - delta), P = w * exp(scale * q k^T - lse), to its own queries' dq and its own keys' dk and dv.
- dq: as in the forward, samples in order of positions, then buckets level by level, in place in float32.
- dk, dv of samples: a program takes a chunk of an interval's readers; the chunks' sums are added afterwards.
- dk, dv of buckets: a program takes some keys of a bucket and visits all its queries; a key occurs once in a level.
"""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from ..fp_fusion import with_fp_fusion
from ..tiles import load_lse, load_tile, store_tile
from .device import bias_of, gather_tile, interval_of, level_of, outside_window
from .forward import bucket_tile


@triton.jit
def _dscores(q, k, v, dout, lse, delta, keep, bias, scale_log2):
    """Return dS [queries, keys] in float32."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 + bias[None, :]
    weights = tl.where(keep, tl.exp2(scores - lse[:, None]), 0.0)
    dweights = tl.dot(dout, tl.trans(v), input_precision="ieee")
    return weights * (dweights - delta[:, None])


@triton.jit
def _add_dkdv(dk, dv, q, k, v, dout, lse, delta, keep, bias, scale_log2):
    """Add a query tile's part to dk (unscaled) and dv.

    Scores are transposed, so that both products take their left operand from registers.
    """
    scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 + bias[:, None]
    weights = tl.where(keep, tl.exp2(scores - lse[None, :]), 0.0)
    dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
    dweights = tl.dot(v, tl.trans(dout), input_precision="ieee")
    dscores = (weights * (dweights - delta[None, :])).to(q.dtype)
    return tl.dot(dscores, q, dk, input_precision="ieee"), dv


@with_fp_fusion
@triton.jit(do_not_specialize=["num_tiles", "num_levels", "rows", "length", "samples", "sinks", "window_blocks"])
def s2_hyper_sample_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, local_ptr, dq_ptr,
    own_buckets, sample_keys, sample_buckets, sample_weights,
    q_batch, q_head, q_row, dout_batch, dout_head, dout_row, local_batch, local_head, local_row,
    scale, scale_log2, num_tiles, num_levels, rows, group, kv_heads, length, samples, sinks, window_blocks,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, SHORTEST: tl.constexpr, BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Add the samples' part to the exact keys' dq."""
    program = tl.program_id(0)
    first = (num_tiles - 1 - program % num_tiles) * ROWS
    batch_head = (program // num_tiles).to(tl.int64)
    row, member = batch_head // group, batch_head % group
    b, h = row // kv_heads, row % kv_heads * group + member
    position = first + tl.arange(0, ROWS)
    in_range = position < length
    q = load_tile(q_ptr + b * q_batch + h * q_head, first, q_row, in_range, ROWS, DIM, PADDED_DIM, True)
    dout_base = dout_ptr + b * dout_batch + h * dout_head
    dout = load_tile(dout_base, first, dout_row, in_range, ROWS, V_DIM, PADDED_V_DIM, True)
    at = batch_head * length + position
    lse = load_lse(lse_ptr + at, in_range)
    delta = tl.load(delta_ptr + at, mask=in_range, other=0.0)
    dq = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    sample_base = row * 0
    query_base = row * 0
    weight_base = num_levels * 0
    for level in range(0, num_levels):
        size, count, period, shift, drawn = level_of(level, length, samples, SHORTEST, CAUSAL)
        interval, reads = interval_of(first, size, period, CAUSAL)
        entry = query_base + (batch_head * count + interval) * size
        own = tl.load(own_buckets + entry + position - interval * period - shift, mask=in_range & (reads > 0), other=-1)
        base = sample_base + (row * count + interval) * drawn
        for step in range(0, reads * drawn, STEPS):
            sample = step + tl.arange(0, STEPS)
            exists = sample < drawn
            keys = tl.load(sample_keys + base + sample, mask=exists, other=0)
            bucket = tl.load(sample_buckets + base + sample, mask=exists, other=-1)
            bias = tl.load(sample_weights + weight_base + sample, mask=exists, other=0.0)
            k = load_tile(k_ptr + base * DIM, first * 0 + step, DIM, exists, STEPS, DIM, PADDED_DIM, True)
            v = load_tile(v_ptr + base * V_DIM, first * 0 + step, V_DIM, exists, STEPS, V_DIM, PADDED_V_DIM, True)
            bias = bias_of(bias, keys, exists, sinks)
            keep = outside_window(position[:, None], keys[None, :], window_blocks, BLOCK, CAUSAL)
            keep = keep & (own[:, None] != bucket[None, :])
            dscores = _dscores(q, k, v, dout, lse, delta, keep, bias, scale_log2)
            dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
        sample_base += rows.to(tl.int64) * count * drawn
        query_base += rows.to(tl.int64) * group * count * size
        weight_base += drawn
    dq = dq * scale
    if LOCAL:
        local_base = local_ptr + b * local_batch + h * local_head
        dq += load_tile(local_base, first, local_row, in_range, ROWS, DIM, PADDED_DIM, True).to(tl.float32)
    store_tile(dq_ptr + batch_head * length * DIM, first, DIM, in_range, dq, ROWS, DIM, PADDED_DIM)


@with_fp_fusion
@triton.jit(
    do_not_specialize=[
        "chunks",
        "query_base",
        "sample_base",
        "drawn",
        "count",
        "length",
        "sinks",
        "window_blocks",
    ]
)
def s2_hyper_sample_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    own_buckets, sample_keys, sample_buckets, sample_weights,
    q_batch, q_head, q_row, dout_batch, dout_head, dout_row,
    scale, scale_log2, chunks, chunk_size, query_base, sample_base, drawn, count, size, period, shift,
    group, kv_heads, length, sinks, window_blocks,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Sum a sample tile's dk and dv over a chunk of readers.

    Readers are of all heads of the group.

    Results are float32 [rows, intervals, chunks, samples, DIM].
    """
    program = tl.program_id(0)
    sample_tiles = (drawn + ROWS - 1) // ROWS
    tile = program % sample_tiles
    part = program // sample_tiles
    chunk = part % chunks
    row_interval = (part // chunks).to(tl.int64)
    row, interval = row_interval // count, row_interval % count
    b, kv = row // kv_heads, row % kv_heads
    sample = tile * ROWS + tl.arange(0, ROWS)
    exists = sample < drawn
    base = sample_base + row_interval * drawn
    keys = tl.load(sample_keys + base + sample, mask=exists, other=0)
    bucket = tl.load(sample_buckets + base + sample, mask=exists, other=-1)
    bias = bias_of(tl.load(sample_weights + sample, mask=exists, other=0.0), keys, exists, sinks)
    k = load_tile(k_ptr + base * DIM, tile * ROWS, DIM, exists, ROWS, DIM, PADDED_DIM, True)
    v = load_tile(v_ptr + base * V_DIM, tile * ROWS, V_DIM, exists, ROWS, V_DIM, PADDED_V_DIM, True)
    dk = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    dv = tl.zeros([ROWS, PADDED_V_DIM], tl.float32)
    begin = chunk * chunk_size
    end = tl.minimum(begin + chunk_size, size)
    start = (interval * period + shift).to(tl.int32)  # of the readers
    steps = (tl.minimum(end, length - start) - begin + STEPS - 1) // STEPS
    steps = tl.maximum(steps, 0)
    for step in range(0, group * steps):
        member = step // steps
        local = begin + step % steps * STEPS
        position = start + local + tl.arange(0, STEPS)
        in_range = (local + tl.arange(0, STEPS) < end) & (position < length)
        q_base = q_ptr + b * q_batch + (kv * group + member) * q_head
        dout_base = dout_ptr + b * dout_batch + (kv * group + member) * dout_head
        q = load_tile(q_base, start + local, q_row, in_range, STEPS, DIM, PADDED_DIM, True)
        dout = load_tile(dout_base, start + local, dout_row, in_range, STEPS, V_DIM, PADDED_V_DIM, True)
        at = (row * group + member) * length + position
        lse = load_lse(lse_ptr + at, in_range)
        delta = tl.load(delta_ptr + at, mask=in_range, other=0.0)
        entry = query_base + ((row * group + member) * count + interval) * size
        own = tl.load(own_buckets + entry + local + tl.arange(0, STEPS), mask=in_range, other=-1)
        keep = outside_window(position[None, :], keys[:, None], window_blocks, BLOCK, CAUSAL)
        keep = keep & (own[None, :] != bucket[:, None])
        dk, dv = _add_dkdv(dk, dv, q, k, v, dout, lse, delta, keep, bias, scale_log2)
    sums = (row_interval * chunks + chunk) * drawn
    store_tile(dk_ptr + sums * DIM, tile * ROWS, DIM, exists, dk * scale, ROWS, DIM, PADDED_DIM)
    store_tile(dv_ptr + sums * V_DIM, tile * ROWS, V_DIM, exists, dv, ROWS, V_DIM, PADDED_V_DIM)


@with_fp_fusion
@triton.jit(do_not_specialize=["first_tile", "bucket_base", "buckets", "count", "length", "sinks", "window_blocks"])
def s2_hyper_bucket_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, tiles, queries, keys_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, dout_batch, dout_head, dout_row,
    scale, scale_log2, first_tile, bucket_base, buckets, count, size, group, kv_heads, length, sinks,
    window_blocks,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, BUCKET: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Add one bucket's part to a query tile's dq."""
    tile = first_tile + tl.program_id(0)
    if tl.load(tiles + tile * 3) < 0:
        return
    b, kv, row, row_interval, bucket, member, position, exists = bucket_tile(
        tiles, queries, tile, bucket_base, buckets, count, kv_heads, length, ROWS
    )
    member, at_row = member.to(tl.int64), position.to(tl.int64)
    q = gather_tile(
        q_ptr + b * q_batch + kv * group * q_head, member * q_head + at_row * q_row, 1, exists, DIM, PADDED_DIM
    )
    dout_base = dout_ptr + b * dout_batch + kv * group * dout_head
    dout = gather_tile(dout_base, member * dout_head + at_row * dout_row, 1, exists, V_DIM, PADDED_V_DIM)
    at = row * group * length + member * length + position
    lse = load_lse(lse_ptr + at, exists)
    delta = tl.load(delta_ptr + at, mask=exists, other=0.0)
    k_base = k_ptr + b * k_batch + kv * k_head
    v_base = v_ptr + b * v_batch + kv * v_head
    sorted_keys = keys_ptr + row_interval.to(tl.int64) * size
    dq = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    slots = bucket * BUCKET + tl.arange(0, STEPS)
    next_keys = tl.load(sorted_keys + slots, mask=slots < size, other=0)
    for step in range(0, BUCKET, STEPS):
        keys = next_keys
        filled = slots + step < size
        next_keys = tl.load(sorted_keys + slots + step + STEPS, mask=slots + step + STEPS < size, other=0)
        k = gather_tile(k_base, keys, k_row, filled, DIM, PADDED_DIM)
        v = gather_tile(v_base, keys, v_row, filled, V_DIM, PADDED_V_DIM)
        bias = bias_of(tl.zeros([STEPS], tl.float32), keys, filled, sinks)
        keep = outside_window(position[:, None], keys[None, :], window_blocks, BLOCK, CAUSAL)
        dscores = _dscores(q, k, v, dout, lse, delta, keep, bias, scale_log2)
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
    dims = tl.arange(0, PADDED_DIM)
    pointers = dq_ptr + at[:, None] * DIM + dims[None, :]
    mask = exists[:, None] & (dims < DIM)[None, :]
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + dq * scale, mask=mask)


@with_fp_fusion
@triton.jit(do_not_specialize=["bucket_base", "buckets", "count", "length", "sinks", "window_blocks"])
def s2_hyper_bucket_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, bucket_starts, queries, keys_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, dout_batch, dout_head, dout_row,
    scale, scale_log2, bucket_base, buckets, count, size, group, kv_heads, length, sinks, window_blocks,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, BUCKET: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Add all its queries' part to a bucket's dk and dv."""
    PER_BUCKET: tl.constexpr = BUCKET // ROWS
    program = tl.program_id(0)
    local = program // PER_BUCKET
    row_interval = local // buckets
    row = (row_interval // count).to(tl.int64)
    b, kv = row // kv_heads, row % kv_heads
    slot = local % buckets * BUCKET + program % PER_BUCKET * ROWS + tl.arange(0, ROWS)
    filled = slot < size
    keys = tl.load(keys_ptr + row_interval.to(tl.int64) * size + slot, mask=filled, other=0)
    k = gather_tile(k_ptr + b * k_batch + kv * k_head, keys, k_row, filled, DIM, PADDED_DIM)
    v = gather_tile(v_ptr + b * v_batch + kv * v_head, keys, v_row, filled, V_DIM, PADDED_V_DIM)
    q_base = q_ptr + b * q_batch + kv * group * q_head
    dout_base = dout_ptr + b * dout_batch + kv * group * dout_head
    begin = tl.load(bucket_starts + bucket_base + local)
    end = tl.load(bucket_starts + bucket_base + local + 1)
    dk = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    dv = tl.zeros([ROWS, PADDED_V_DIM], tl.float32)
    bias = bias_of(tl.zeros([ROWS], tl.float32), keys, filled, sinks)
    steps = tl.arange(0, STEPS)
    next_query = tl.load(queries + begin + steps, mask=begin + steps < end, other=0)
    for first in range(begin, end, STEPS):
        query = next_query
        exists = first + steps < end
        next_query = tl.load(queries + first + STEPS + steps, mask=first + STEPS + steps < end, other=0)
        member, position = (query // length).to(tl.int64), query % length
        at_row = position.to(tl.int64)
        q = gather_tile(q_base, member * q_head + at_row * q_row, 1, exists, DIM, PADDED_DIM)
        dout = gather_tile(dout_base, member * dout_head + at_row * dout_row, 1, exists, V_DIM, PADDED_V_DIM)
        at = row * group * length + query
        lse = load_lse(lse_ptr + at, exists)
        delta = tl.load(delta_ptr + at, mask=exists, other=0.0)
        keep = outside_window(position[None, :], keys[:, None], window_blocks, BLOCK, CAUSAL)
        dk, dv = _add_dkdv(dk, dv, q, k, v, dout, lse, delta, keep, bias, scale_log2)
    at = row * length + keys
    dims = tl.arange(0, PADDED_DIM)
    pointers = dk_ptr + at[:, None] * DIM + dims[None, :]
    mask = filled[:, None] & (dims < DIM)[None, :]
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + dk * scale, mask=mask)
    v_dims = tl.arange(0, PADDED_V_DIM)
    pointers = dv_ptr + at[:, None] * V_DIM + v_dims[None, :]
    mask = filled[:, None] & (v_dims < V_DIM)[None, :]
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + dv, mask=mask)
