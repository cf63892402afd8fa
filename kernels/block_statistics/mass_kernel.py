"""Triton kernel of `block_mass`.

Each visible pair takes one product and one exponential. A program owns a tile of one query block and one head. It
visits key blocks in order, or the slots of a list, and writes one sum for each. Tiles are aligned to blocks, so that
the first and the last of a call may be partial or empty.
"""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import config_for, padded, shared_limit
from ..fp_fusion import with_fp_fusion
from ..spec import empty
from ..tiles import LOG2_E, check_launch, last_contiguous, load_lse, load_tile, strides
from ..topk_layout import TopKLayout
from .blocks import query_blocks
from .device import visible_tiles
from .spec import StatisticSpec


@triton.jit
def _tile_mass(
    q, lse, k_base, k_stride, key, last_key, position, num_keys, scale_log2,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, STEPS: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Sum the weights of a tile's rows over STEPS keys.

    The keys are [key, key + STEPS), as far as they lie before `last_key`.
    """
    keys = key + tl.arange(0, STEPS)
    in_range = (keys < num_keys) & (keys < last_key)
    k = load_tile(k_base, key, k_stride, in_range, STEPS, DIM, PADDED_DIM, MASK)
    weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse[:, None])
    if MASK:
        keep = in_range[None, :]
        if CAUSAL:
            keep = keep & (position[:, None] >= keys[None, :])
        weights = tl.where(keep, weights, 0.0)
    return tl.sum(tl.sum(weights, 1), 0)


@with_fp_fusion
@triton.jit(
    do_not_specialize=[
        "num_heads",
        "group",
        "s_q",
        "s_k",
        "query_offset",
        "first_block",
        "n_q",
        "n_k",
        "list_blocks",
    ]
)
def s2_block_mass_kernel(
    q_ptr, k_ptr, lse_ptr, indices_ptr, mass_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    scale_log2, num_heads, group, s_q, s_k, query_offset, first_block, n_q, n_k, list_blocks,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
    SLOTS: tl.constexpr, CAUSAL: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Write mass [b, H, n_q, BLOCK // ROWS, n_k].

    If LISTED, n_k counts slots. Sums are divided by the block's rows and by `group`.
    """
    TILES: tl.constexpr = BLOCK // ROWS
    PER_BLOCK: tl.constexpr = BLOCK // STEPS
    program = tl.program_id(0)
    num_tiles = n_q * TILES
    tile = num_tiles - 1 - program % num_tiles  # late tiles see the most keys, so they start first
    batch_head = (program // num_tiles).to(tl.int64)
    b, h = batch_head // num_heads, batch_head % num_heads
    block = first_block + tile // TILES
    first = block * BLOCK + tile % TILES * ROWS
    position = first + tl.arange(0, ROWS)
    end = query_offset + s_q
    in_range = (position >= query_offset) & (position < end)
    q_base = q_ptr + b * q_batch + h * q_head - query_offset.to(tl.int64) * q_row
    k_base = k_ptr + b * k_batch + h // group * k_head
    q = load_tile(q_base, first, q_row, in_range, ROWS, DIM, PADDED_DIM, True)
    lse = load_lse(lse_ptr + batch_head * s_q + position - query_offset, in_range)
    out = mass_ptr + (batch_head * num_tiles + tile) * n_k
    rows = tl.minimum(block * BLOCK + BLOCK, end) - tl.maximum(block * BLOCK, query_offset)
    weight = 1.0 / (rows * group).to(tl.float32)

    total = 0.0
    if LISTED:
        entry = ((b * (num_heads // group) + h // group) * list_blocks + block) * n_k
        slots = tl.arange(0, SLOTS)
        listed = tl.load(indices_ptr + entry + slots, mask=slots < n_k, other=-1)
        for step in range(0, n_k * PER_BLOCK):
            slot = step // PER_BLOCK
            column = tl.load(indices_ptr + entry + slot)
            # a block's second mention counts nothing
            mentions = tl.sum(((listed == column) & (slots < slot)).to(tl.int32), 0)
            used = (column >= 0) & (mentions == 0)
            if CAUSAL:
                used = used & (column <= block)
            key = tl.maximum(column, 0) * BLOCK + step % PER_BLOCK * STEPS
            last_key = tl.where(used, s_k, 0)
            total += _tile_mass(
                q, lse, k_base, k_row, key, last_key, position, s_k, scale_log2,
                DIM, PADDED_DIM, STEPS, CAUSAL, True,
            )  # fmt: skip
            done = step % PER_BLOCK == PER_BLOCK - 1
            tl.store(out + slot, total * weight, mask=done)
            total = tl.where(done, 0.0, total)
    else:
        full, stop = visible_tiles(first, s_k, ROWS, STEPS, BLOCK, CAUSAL)
        for step in range(0, full):
            total += _tile_mass(
                q, lse, k_base, k_row, step * STEPS + s_k * 0, s_k, position, s_k, scale_log2,
                DIM, PADDED_DIM, STEPS, CAUSAL, False,
            )  # fmt: skip
            done = step % PER_BLOCK == PER_BLOCK - 1
            tl.store(out + step // PER_BLOCK, total * weight, mask=done)
            total = tl.where(done, 0.0, total)
        for step in range(full, stop):
            total += _tile_mass(
                q, lse, k_base, k_row, step * STEPS + s_k * 0, s_k, position, s_k, scale_log2,
                DIM, PADDED_DIM, STEPS, CAUSAL, True,
            )  # fmt: skip
            done = step % PER_BLOCK == PER_BLOCK - 1
            tl.store(out + step // PER_BLOCK, total * weight, mask=done)
            total = tl.where(done, 0.0, total)
        for start in range(stop // PER_BLOCK, n_k, 256):
            later = start + tl.arange(0, 256)
            tl.store(out + later, tl.zeros([256], tl.float32), mask=later < n_k)


def triton_mass(q: Tensor, k: Tensor, lse: Tensor, spec: StatisticSpec, layout: TopKLayout | None) -> Tensor:
    """Compute `block_mass` of views q, k [b, h, s, d]."""
    block_size = spec.block_size
    q, k, lse = last_contiguous(q), last_contiguous(k), lse.contiguous()
    (b, heads, s_q, dim), (kv_heads, s_k) = q.shape, k.shape[1:3]
    group = heads // kv_heads
    first, n_q = query_blocks(s_q, spec.query_offset, block_size)
    n_k = -(-s_k // block_size) if layout is None else layout.slots
    config = config_for("forward", block_size, dim, dim, q.dtype, shared_limit(q.device))
    tiles = block_size // config.rows
    of_heads = empty((b, heads, n_q, tiles, n_k), torch.float32, q.device)
    programs = b * heads * n_q * tiles
    check_launch(programs, n_k, block_size // config.steps)
    with torch.cuda.device_of(q):
        s2_block_mass_kernel[(programs,)](
            q, k, lse, None if layout is None else layout.indices, of_heads, *strides(q), *strides(k),
            spec.softmax_scale * LOG2_E, heads, group, s_q, s_k, spec.query_offset, first, n_q, n_k,
            0 if layout is None else layout.num_query_blocks,
            DIM=dim, PADDED_DIM=padded(dim), BLOCK=block_size, ROWS=config.rows, STEPS=config.steps,
            SLOTS=1 if layout is None else triton.next_power_of_2(n_k), CAUSAL=spec.causal, LISTED=layout is not None,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    mass = of_heads.sum(3) if tiles > 1 else of_heads[:, :, :, 0]
    return mass if group == 1 else mass.unflatten(1, (kv_heads, group)).sum(2)
