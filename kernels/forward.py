"""Triton forward of block-sparse attention: online softmax over kept key blocks.

A program owns one query tile of one head. Tiles are aligned to global blocks, so the first one of a call with a query
offset may be partial. Positions count from the start of the sequence or of the packed document.
"""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bounds_cache import of_documents
from .configs import config_for, padded, shared_limit
from .fp_fusion import with_fp_fusion
from .spec import AttentionSpec, empty, empty_bhsd
from .tiles import LOG2_E, check_launch, count_below, document_tiles, load_tile, store_tile, strides, tile_of_document
from .topk_layout import Layout

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def query_tile(
    tiles, num_tiles, num_heads, s_q, s_k, query_offset, ROWS: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Locate this program's query tile.

    Returns batch, head, first position, range of positions that have a query, number of keys, and the offsets from a
    position to the row in q and in k. Late tiles see the most keys, so they start first.
    """
    program = tl.program_id(0)
    tile = num_tiles - 1 - program % num_tiles
    batch_head = program // num_tiles
    if PACKED:
        first, start, length = tile_of_document(tiles, tile, ROWS)
        low, high, num_keys, query_shift, key_shift = length * 0, length, length, start, start
    else:
        first = (query_offset // ROWS + tile) * ROWS
        low, high, num_keys = query_offset + 0, query_offset + s_q, s_k + 0
        query_shift, key_shift = 0 - query_offset, s_k * 0
    return batch_head // num_heads, batch_head % num_heads, first, low, high, num_keys, query_shift, key_shift


@triton.jit
def key_tiles(
    pattern_of_head, row_offsets, row_columns, num_query_blocks, head, first, num_keys,
    ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Return begin, full, stop of a query tile's key tiles.

    Tiles [begin, full) need no mask; [full, stop) do. They are numbered over the CSR's columns, `PER_BLOCK` to each;
    `key_position` maps them back.
    """
    PER_BLOCK: tl.constexpr = BLOCK // STEPS
    i = first // BLOCK
    row = tl.load(pattern_of_head + head) * num_query_blocks + i
    begin = tl.load(row_offsets + row)
    end = tl.load(row_offsets + row + 1)
    whole_blocks = num_keys // BLOCK
    blocks = (num_keys + BLOCK - 1) // BLOCK
    if CAUSAL:
        whole_blocks = tl.minimum(whole_blocks, i)
        blocks = tl.minimum(blocks, i + 1)
    num_full, num_kept = count_below(row_columns, begin, end, whole_blocks, blocks, 256)
    full = begin + num_full
    stop = (begin + num_kept) * PER_BLOCK
    if CAUSAL and ROWS < BLOCK:
        # in the diagonal block, only tiles that start at or before the last query
        diagonal = tl.load(row_columns + begin + num_kept - 1, mask=num_kept > 0, other=-1)
        beyond = PER_BLOCK - (first % BLOCK + ROWS - 1) // STEPS - 1
        stop = tl.where(diagonal == i, stop - beyond, stop)
    return begin * PER_BLOCK, full * PER_BLOCK, stop


@triton.jit
def key_position(row_columns, tile, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the first key position of a tile counted by `key_tiles`."""
    PER_BLOCK: tl.constexpr = BLOCK // STEPS
    return tl.load(row_columns + tile // PER_BLOCK) * BLOCK + tile % PER_BLOCK * STEPS


@triton.jit
def _attend(
    acc, total, peak, q, k_base, v_base, k_stride, v_stride, key, position, num_keys, scale_log2,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr,
    STEPS: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Process one key tile of the online softmax.

    `peak` is the running maximum of the scores in base 2.
    """
    keys = key + tl.arange(0, STEPS)
    in_range = keys < num_keys
    k = load_tile(k_base, key, k_stride, in_range, STEPS, DIM, PADDED_DIM, MASK)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASK:
        keep = in_range[None, :]
        if CAUSAL:
            keep = keep & (position[:, None] >= keys[None, :])
        scores = tl.where(keep, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
    shift = new_peak
    if MASK:
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # rows without a key so far
    weights = tl.exp2(scores * scale_log2 - shift[:, None])
    decay = tl.exp2(peak - shift)
    total = total * decay + tl.sum(weights, 1)
    v = load_tile(v_base, key, v_stride, in_range, STEPS, V_DIM, PADDED_V_DIM, MASK)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, total, new_peak


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
def s2_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, pattern_of_head, row_offsets, row_columns, tiles,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    scale_log2, num_tiles, num_heads, group, s_q, s_k, query_offset, num_query_blocks, pattern_stride,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    batch, head, first, low, high, num_keys, query_shift, key_shift = query_tile(
        tiles, num_tiles, num_heads, s_q, s_k, query_offset, ROWS, PACKED
    )
    if first >= high:
        return
    b, h, kv = batch.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
    query_shift, key_shift = query_shift.to(tl.int64), key_shift.to(tl.int64)
    q_base = q_ptr + b * q_batch + h * q_head + query_shift * q_row
    k_base = k_ptr + b * k_batch + kv * k_head + key_shift * k_row
    v_base = v_ptr + b * v_batch + kv * v_head + key_shift * v_row
    position = first + tl.arange(0, ROWS)
    in_range = (position >= low) & (position < high)
    q = load_tile(q_base, first, q_row, in_range, ROWS, DIM, PADDED_DIM, True)

    acc = tl.zeros([ROWS, PADDED_V_DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    begin, full, stop = key_tiles(
        pattern_of_head + batch * pattern_stride, row_offsets, row_columns, num_query_blocks, head, first, num_keys,
        ROWS, STEPS, BLOCK, CAUSAL,
    )  # fmt: skip
    for tile in range(begin, full):
        key = key_position(row_columns, tile, STEPS, BLOCK)
        acc, total, peak = _attend(
            acc, total, peak, q, k_base, v_base, k_row, v_row, key, position, num_keys, scale_log2,
            DIM, V_DIM, PADDED_DIM, PADDED_V_DIM, STEPS, CAUSAL, False,
        )  # fmt: skip
    for tile in range(full, stop):
        key = key_position(row_columns, tile, STEPS, BLOCK)
        acc, total, peak = _attend(
            acc, total, peak, q, k_base, v_base, k_row, v_row, key, position, num_keys, scale_log2,
            DIM, V_DIM, PADDED_DIM, PADDED_V_DIM, STEPS, CAUSAL, True,
        )  # fmt: skip

    safe_total = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("-inf"), (peak + tl.log2(safe_total)) * _LN_2)
    tl.store(lse_ptr + (b * num_heads + h) * s_q + query_shift + position, lse, mask=in_range)
    out_base = out_ptr + b * out_batch + h * out_head + query_shift * out_row
    store_tile(out_base, first, out_row, in_range, acc / safe_total[:, None], ROWS, V_DIM, PADDED_V_DIM)


def num_query_tiles(s_q: int, query_offset: int, rows: int) -> int:
    """Count aligned tiles of `rows` positions that hold s_q queries from `query_offset`."""
    return -(-(query_offset + s_q) // rows) - query_offset // rows


def pattern_stride(layout: Layout) -> int:
    """Return the stride of `pattern_of_head` between sequences; 0 if all share patterns."""
    return 0 if layout.batch_size == 1 else layout.num_heads


def packed_tiles(spec: AttentionSpec, layout: Layout, num_rows: int, rows: int) -> Tensor | None:
    """Return the call's `document_tiles`; None without packed documents."""
    bounds = spec.cu_seqlens
    if bounds is None:
        return None
    build = partial(document_tiles, bounds, num_rows, rows)
    return of_documents(layout.cache, ("document_tiles", rows), bounds, num_rows, build)


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Compute output [b, h, s_q, d_v] and log-sum-exp float32 [b, h, s_q].

    The output is contiguous in `spec.format`. q is a view [b, h, s_q, d], k [b, h_kv, s_k, d], v [b, h_kv, s_k, d_v];
    all strides but the last are arbitrary.
    """
    batch, num_heads, s_q, dim = q.shape
    num_kv_heads, s_k, v_dim = v.shape[1:]
    out = empty_bhsd((batch, num_heads, s_q, v_dim), q, spec.format)
    lse = empty((batch, num_heads, s_q), torch.float32, q.device)
    config = config_for("forward", layout.block_size, dim, v_dim, q.dtype, shared_limit(q.device))
    tiles = packed_tiles(spec, layout, s_q, config.rows)
    num_tiles = num_query_tiles(s_q, spec.query_offset, config.rows) if tiles is None else len(tiles)
    if out.numel() == 0:
        return out, lse
    programs = batch * num_heads * num_tiles
    check_launch(programs, layout.row_columns.numel(), layout.block_size // config.steps)
    with torch.cuda.device_of(q):
        s2_attention_fwd_kernel[(programs,)](
            q, k, v, out, lse, layout.pattern_of_head, layout.row_offsets, layout.row_columns, tiles,
            *strides(q), *strides(k), *strides(v), *strides(out),
            spec.softmax_scale * LOG2_E, num_tiles, num_heads, num_heads // num_kv_heads, s_q, s_k,
            spec.query_offset, layout.num_query_blocks, pattern_stride(layout),
            DIM=dim, V_DIM=v_dim, PADDED_DIM=padded(dim), PADDED_V_DIM=padded(v_dim),
            BLOCK=layout.block_size, ROWS=config.rows, STEPS=config.steps,
            CAUSAL=spec.causal, PACKED=tiles is not None,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out, lse
