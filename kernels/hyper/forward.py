"""Triton forward of HyperAttention: hashes, samples, buckets.

The exact keys' output and log-sum-exp come from the block-sparse op. The sample kernel visits queries in order of
positions: it adds the samples of all intervals that a tile reads, and stores the sum in float32. A bucket kernel for
each level then visits queries sorted by bucket, so that a tile of them shares its keys, and adds the bucket to the sum
in place: a query occurs once in a level, so nothing is atomic.
"""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from ..fp_fusion import with_fp_fusion
from ..tiles import LOG2_E, load_tile, store_tile
from .device import bias_of, gather_tile, interval_of, level_of, outside_window

_LOG2_E = tl.constexpr(LOG2_E)
_LN_2 = tl.constexpr(0.6931471805599453)


@with_fp_fusion
@triton.jit(do_not_specialize=["num_tiles", "heads", "length"])
def s2_hyper_hash_kernel(
    x_ptr, directions_ptr, ranks_ptr, x_batch, x_head, x_row, num_tiles, heads, group, length,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BITS: tl.constexpr, PADDED_BITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Hash a tile of rows as `gray_ranks`.

    A row's hash depends on no other row.
    """
    program = tl.program_id(0)
    first = program % num_tiles * ROWS
    batch_head = (program // num_tiles).to(tl.int64)
    b, h = batch_head // heads, batch_head % heads
    at = first + tl.arange(0, ROWS)
    in_range = at < length
    x = load_tile(x_ptr + b * x_batch + h * x_head, first, x_row, in_range, ROWS, DIM, PADDED_DIM, True)
    dims, bits = tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_BITS)
    directions = tl.load(
        directions_ptr + h // group * DIM * BITS + dims[:, None] * BITS + bits[None, :],
        mask=(dims < DIM)[:, None] & (bits < BITS)[None, :], other=0.0,
    )  # fmt: skip
    positive = tl.dot(x, directions, input_precision="ieee") > 0
    rank = tl.sum(tl.where(positive & (bits < BITS)[None, :], (1 << bits)[None, :], 0), 1)
    rank = rank ^ (rank >> 1)
    rank = rank ^ (rank >> 2)
    rank = rank ^ (rank >> 4)
    rank = rank ^ (rank >> 8)
    rank = rank ^ (rank >> 16)
    tl.store(ranks_ptr + batch_head * length + at, rank, mask=in_range)


@triton.jit
def _attend(
    acc, total, peak, q, k, v, keep, bias, scale_log2
):  # fmt: skip
    """Process one key tile of the online softmax.

    `bias` holds base-2 log-weights of keys.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 + bias[None, :]
    scores = tl.where(keep, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # rows without a key so far
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(peak - shift)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, total, new_peak


@with_fp_fusion
@triton.jit(do_not_specialize=["num_tiles", "num_levels", "rows", "length", "samples", "sinks", "window_blocks"])
def s2_hyper_sample_fwd_kernel(
    q_ptr, k_ptr, v_ptr, local_ptr, local_lse_ptr, out_ptr, lse_ptr,
    own_buckets, sample_keys, sample_buckets, sample_weights,
    q_batch, q_head, q_row, local_batch, local_head, local_row,
    scale_log2, num_tiles, num_levels, rows, group, kv_heads, length, samples, sinks, window_blocks,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, SHORTEST: tl.constexpr, BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Add the samples of all intervals to a query tile's exact keys.

    k_ptr and v_ptr are sampled keys and values, [all samples, DIM]. Late tiles read the most intervals and start first.
    """
    program = tl.program_id(0)
    first = (num_tiles - 1 - program % num_tiles) * ROWS
    batch_head = (program // num_tiles).to(tl.int64)
    row, member = batch_head // group, batch_head % group
    b, h = row // kv_heads, row % kv_heads * group + member
    position = first + tl.arange(0, ROWS)
    in_range = position < length
    q = load_tile(q_ptr + b * q_batch + h * q_head, first, q_row, in_range, ROWS, DIM, PADDED_DIM, True)
    at = batch_head * length + position
    if LOCAL:
        local_base = local_ptr + b * local_batch + h * local_head
        acc = load_tile(local_base, first, local_row, in_range, ROWS, V_DIM, PADDED_V_DIM, True).to(tl.float32)
        peak = tl.load(local_lse_ptr + at, mask=in_range, other=0.0) * _LOG2_E
        total = tl.where(peak == float("-inf"), 0.0, 1.0)
    else:
        acc = tl.zeros([ROWS, PADDED_V_DIM], tl.float32)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
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
            acc, total, peak = _attend(acc, total, peak, q, k, v, keep, bias, scale_log2)
        sample_base += rows.to(tl.int64) * count * drawn
        query_base += rows.to(tl.int64) * group * count * size
        weight_base += drawn
    safe_total = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("-inf"), (peak + tl.log2(safe_total)) * _LN_2)
    tl.store(lse_ptr + at, lse, mask=in_range)
    out = acc / safe_total[:, None]
    store_tile(out_ptr + batch_head * length * V_DIM, first, V_DIM, in_range, out, ROWS, V_DIM, PADDED_V_DIM)


@triton.jit
def bucket_tile(tiles, queries, tile, bucket_base, buckets, count, kv_heads, length, ROWS: tl.constexpr):
    """Locate a tile of one bucket's queries.

    Returns batch, KV head, row (in 64 bits), row with interval, bucket within the interval, members, positions, and
    which queries exist.
    """
    first = tl.load(tiles + tile * 3 + 1)
    end = tl.load(tiles + tile * 3 + 2)
    local = tl.load(tiles + tile * 3) - bucket_base
    row_interval = local // buckets
    row = (row_interval // count).to(tl.int64)
    at = first + tl.arange(0, ROWS)
    exists = at < end
    query = tl.load(queries + at, mask=exists, other=0)
    return row // kv_heads, row % kv_heads, row, row_interval, local % buckets, query // length, query % length, exists


@with_fp_fusion
@triton.jit(do_not_specialize=["first_tile", "bucket_base", "buckets", "count", "length", "sinks", "window_blocks"])
def s2_hyper_bucket_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles, queries, keys_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    scale_log2, first_tile, bucket_base, buckets, count, size, group, kv_heads, length, sinks, window_blocks,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, BUCKET: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Add one bucket's keys to a query tile's output and log-sum-exp.

    keys_ptr is the level's part of the plan's sorted keys. Queries and keys are gathered, 2 * DIM bytes a row.
    """
    tile = first_tile + tl.program_id(0)
    if tl.load(tiles + tile * 3) < 0:
        return
    b, kv, row, row_interval, bucket, member, position, exists = bucket_tile(
        tiles, queries, tile, bucket_base, buckets, count, kv_heads, length, ROWS
    )
    q_base = q_ptr + b * q_batch + kv * group * q_head
    q_rows = member.to(tl.int64) * q_head + position.to(tl.int64) * q_row
    q = gather_tile(q_base, q_rows, 1, exists, DIM, PADDED_DIM)
    k_base = k_ptr + b * k_batch + kv * k_head
    v_base = v_ptr + b * v_batch + kv * v_head
    sorted_keys = keys_ptr + row_interval.to(tl.int64) * size

    acc = tl.zeros([ROWS, PADDED_V_DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    # keys of a step are looked up in the step before, so that gathered rows can be loaded ahead
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
        acc, total, peak = _attend(acc, total, peak, q, k, v, keep, bias, scale_log2)

    at = row * group * length + member * length + position
    old_lse = tl.load(lse_ptr + at, mask=exists, other=0.0) * _LOG2_E
    safe_total = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("-inf"), peak + tl.log2(safe_total))
    highest = tl.maximum(old_lse, lse)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    old_weight, weight = tl.exp2(old_lse - shift), tl.exp2(lse - shift)
    both = old_weight + weight
    safe_both = tl.where(both == 0.0, 1.0, both)
    out = gather_tile(out_ptr, at, V_DIM, exists, V_DIM, PADDED_V_DIM)
    out = out * (old_weight / safe_both)[:, None] + acc * (weight / safe_total / safe_both)[:, None]
    tl.store(lse_ptr + at, tl.where(both == 0.0, float("-inf"), (shift + tl.log2(safe_both)) * _LN_2), mask=exists)
    dims = tl.arange(0, PADDED_V_DIM)
    pointers = out_ptr + at[:, None] * V_DIM + dims[None, :]
    tl.store(pointers, out, mask=exists[:, None] & (dims < V_DIM)[None, :])
