"""Triton kernels of `block_effects` and `rule_effects`.

Each visible pair takes two products and one exponential. A program owns one query block of one head (and of eight
rules). It visits the sequences and the tiles of the block one after the other, so that sums over them need no atomics.
With h = sum A (delta - dP) over a block of keys, its removal from a row has effect h / (1 - p); where p is large, -(sum
of the other blocks' h) / (sum of their p). For that the row's largest block is kept apart while the others are added
up, and its effect is written after the last key.
"""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import Config, config_for, padded, shared_limit
from ..fp_fusion import with_fp_fusion
from ..tiles import LOG2_E, check_launch, last_contiguous, load_lse, load_tile, strides
from .blocks import query_blocks
from .device import visible_tiles
from .reference import LARGE, LEAST_KEPT
from .spec import EffectInputs, StatisticSpec

_LEAST_KEPT = tl.constexpr(LEAST_KEPT)
_LARGE = tl.constexpr(LARGE)
RULES_AT_ONCE = 8  # of one program: four sums for each of them and each row lie in registers


@triton.jit
def _load_rows(
    q_ptr, dout_ptr, lse_ptr, delta_ptr, q_batch, q_head, q_row, dout_batch, dout_head, dout_row,
    b, h, first, num_heads, s_q, query_offset,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Load q, dout, base-2 log-sum-exp and delta of a tile.

    Returns them with the rows' positions and which rows exist. Rows out of range or without keys have delta 0.
    """
    position = first + tl.arange(0, ROWS)
    in_range = (position >= query_offset) & (position < query_offset + s_q)
    shift = query_offset.to(tl.int64)
    q = load_tile(
        q_ptr + b * q_batch + h * q_head - shift * q_row, first, q_row, in_range, ROWS, DIM, PADDED_DIM, True
    )  # fmt: skip
    dout_base = dout_ptr + b * dout_batch + h * dout_head - shift * dout_row
    dout = load_tile(dout_base, first, dout_row, in_range, ROWS, V_DIM, PADDED_V_DIM, True)
    at = (b * num_heads + h) * s_q + position - query_offset
    lse = load_lse(lse_ptr + at, in_range)
    delta = tl.where(lse == float("inf"), 0.0, tl.load(delta_ptr + at, mask=in_range, other=0.0))
    return q, dout, lse, delta, position, in_range


@triton.jit
def _tile_sums(
    q, dout, lse, delta, k_base, v_base, k_row, v_row, key, position, num_keys, scale_log2,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr,
    STEPS: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Sum each row's A and A (delta - dP) over STEPS keys."""
    keys = key + tl.arange(0, STEPS)
    in_range = keys < num_keys
    k = load_tile(k_base, key, k_row, in_range, STEPS, DIM, PADDED_DIM, MASK)
    v = load_tile(v_base, key, v_row, in_range, STEPS, V_DIM, PADDED_V_DIM, MASK)
    weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse[:, None])
    if MASK:
        keep = in_range[None, :]
        if CAUSAL:
            keep = keep & (position[:, None] >= keys[None, :])
        weights = tl.where(keep, weights, 0.0)
    dweights = tl.dot(dout, tl.trans(v), input_precision="ieee")
    return tl.sum(weights, 1), tl.sum(weights * (delta[:, None] - dweights), 1)


@triton.jit
def _add(at, stride, effect, p):
    """Add a block's four sums to the result.

    No other program writes there.
    """
    at_absolute, at_squared, at_mass = at + stride, at + 2 * stride, at + 3 * stride
    tl.store(at, tl.load(at) + tl.sum(effect, 0))
    tl.store(at_absolute, tl.load(at_absolute) + tl.sum(tl.abs(effect), 0))
    tl.store(at_squared, tl.load(at_squared) + tl.sum(effect * effect, 0))
    tl.store(at_mass, tl.load(at_mass) + tl.sum(p, 0))


@triton.jit
def _visit_block(p, h, p_most, h_most, most, p_rest, h_rest, block, at, stride):
    """Add a finished block's sums, and keep the row's largest block apart."""
    larger = p > p_most
    p_rest += tl.where(larger, p_most, p)
    h_rest += tl.where(larger, h_most, h)
    p_most, h_most = tl.where(larger, p, p_most), tl.where(larger, h, h_most)
    most = tl.where(larger, block, most)
    _add(at, stride, tl.where(p > _LARGE, 0.0, h / (1.0 - tl.minimum(p, _LARGE))), p)
    return p_most, h_most, most, p_rest, h_rest


@with_fp_fusion
@triton.jit(
    do_not_specialize=["num_heads", "group", "batch", "s_q", "s_k", "query_offset", "first_block", "n_q", "n_k"]
)
def s2_block_effects_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, sums_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, dout_batch, dout_head, dout_row,
    scale_log2, num_heads, group, batch, s_q, s_k, query_offset, first_block, n_q, n_k,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Add to sums [4, H, n_q, n_k]."""
    TILES: tl.constexpr = BLOCK // ROWS
    PER_BLOCK: tl.constexpr = BLOCK // STEPS
    program = tl.program_id(0)
    line = n_q - 1 - program % n_q  # late query blocks see the most keys, so they start first
    h = (program // n_q).to(tl.int64)
    stride = n_q.to(tl.int64) * n_k * num_heads
    out = sums_ptr + (h * n_q + line) * n_k
    for tile in range(0, batch * TILES):
        b = (tile // TILES + h * 0).to(tl.int64)
        first = (first_block + line) * BLOCK + tile % TILES * ROWS
        q, dout, lse, delta, position, _ = _load_rows(
            q_ptr, dout_ptr, lse_ptr, delta_ptr, q_batch, q_head, q_row, dout_batch, dout_head, dout_row,
            b, h, first, num_heads, s_q, query_offset, DIM, V_DIM, PADDED_DIM, PADDED_V_DIM, ROWS,
        )  # fmt: skip
        k_base = k_ptr + b * k_batch + h // group * k_head
        v_base = v_ptr + b * v_batch + h // group * v_head
        p, g = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        p_most, g_most = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        p_rest, g_rest = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        most = tl.full([ROWS], -1, tl.int32)
        full, stop = visible_tiles(first, s_k, ROWS, STEPS, BLOCK, CAUSAL)
        for step in range(0, full):
            p_tile, g_tile = _tile_sums(
                q, dout, lse, delta, k_base, v_base, k_row, v_row, step * STEPS + s_k * 0, position, s_k, scale_log2,
                DIM, V_DIM, PADDED_DIM, PADDED_V_DIM, STEPS, CAUSAL, False,
            )  # fmt: skip
            p += p_tile
            g += g_tile
            if step % PER_BLOCK == PER_BLOCK - 1:
                block = step // PER_BLOCK
                p_most, g_most, most, p_rest, g_rest = _visit_block(
                    p, g, p_most, g_most, most, p_rest, g_rest, block, out + block, stride
                )
                p, g = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        for step in range(full, stop):
            p_tile, g_tile = _tile_sums(
                q, dout, lse, delta, k_base, v_base, k_row, v_row, step * STEPS + s_k * 0, position, s_k, scale_log2,
                DIM, V_DIM, PADDED_DIM, PADDED_V_DIM, STEPS, CAUSAL, True,
            )  # fmt: skip
            p += p_tile
            g += g_tile
            if step % PER_BLOCK == PER_BLOCK - 1:
                block = step // PER_BLOCK
                p_most, g_most, most, p_rest, g_rest = _visit_block(
                    p, g, p_most, g_most, most, p_rest, g_rest, block, out + block, stride
                )
                p, g = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        # the large blocks, at most one for each row
        large = p_most > _LARGE
        effect = tl.where(large & (p_rest >= _LEAST_KEPT), -g_rest / tl.maximum(p_rest, _LEAST_KEPT), 0.0)
        low = tl.min(tl.where(large, most, n_k), 0)
        high = tl.max(tl.where(large, most, -1), 0)
        # all threads' stores above are done before they are read again
        tl.debug_barrier()
        for block in range(low, high + 1):
            _add(out + block, stride, tl.where(most == block, effect, 0.0), tl.zeros([ROWS], tl.float32))
        tl.debug_barrier()


@with_fp_fusion
@triton.jit(
    do_not_specialize=[
        "num_heads",
        "group",
        "batch",
        "s_q",
        "s_k",
        "query_offset",
        "first_block",
        "n_q",
        "n_k",
        "num_rules",
        "rule_row",
    ]
)
def s2_rule_effects_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, rules_ptr, sums_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, dout_batch, dout_head, dout_row,
    rule_head, rule_rule, rule_row,
    scale_log2, num_heads, group, batch, s_q, s_k, query_offset, first_block, n_q, n_k, num_rules,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, RULES: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Add to sums [4, H, rules, n_q]."""
    TILES: tl.constexpr = BLOCK // ROWS
    PER_BLOCK: tl.constexpr = BLOCK // STEPS
    program = tl.program_id(0)
    line = n_q - 1 - program % n_q
    h = (program // n_q % num_heads).to(tl.int64)
    rule = program // n_q // num_heads * RULES + tl.arange(0, RULES)
    is_rule = rule < num_rules
    rules = rules_ptr + h * rule_head + rule.to(tl.int64) * rule_rule + line.to(tl.int64) * rule_row
    signed, absolute = tl.zeros([RULES], tl.float32), tl.zeros([RULES], tl.float32)
    squared, mass = tl.zeros([RULES], tl.float32), tl.zeros([RULES], tl.float32)
    for tile in range(0, batch * TILES):
        b = (tile // TILES + h * 0).to(tl.int64)
        first = (first_block + line) * BLOCK + tile % TILES * ROWS
        q, dout, lse, delta, position, in_range = _load_rows(
            q_ptr, dout_ptr, lse_ptr, delta_ptr, q_batch, q_head, q_row, dout_batch, dout_head, dout_row,
            b, h, first, num_heads, s_q, query_offset, DIM, V_DIM, PADDED_DIM, PADDED_V_DIM, ROWS,
        )  # fmt: skip
        k_base = k_ptr + b * k_batch + h // group * k_head
        v_base = v_ptr + b * v_batch + h // group * v_head
        p_kept, g_kept = tl.zeros([ROWS, RULES], tl.float32), tl.zeros([ROWS, RULES], tl.float32)
        p_gone, g_gone = tl.zeros([ROWS, RULES], tl.float32), tl.zeros([ROWS, RULES], tl.float32)
        _, stop = visible_tiles(first, s_k, ROWS, STEPS, BLOCK, CAUSAL)
        for step in range(0, stop):
            p, g = _tile_sums(
                q, dout, lse, delta, k_base, v_base, k_row, v_row, step * STEPS + s_k * 0, position, s_k, scale_log2,
                DIM, V_DIM, PADDED_DIM, PADDED_V_DIM, STEPS, CAUSAL, True,
            )  # fmt: skip
            kept = (tl.load(rules + step // PER_BLOCK, mask=is_rule, other=1) != 0)[None, :]
            p_kept += tl.where(kept, p[:, None], 0.0)
            g_kept += tl.where(kept, g[:, None], 0.0)
            p_gone += tl.where(kept, 0.0, p[:, None])
            g_gone += tl.where(kept, 0.0, g[:, None])
        effect = tl.where(p_gone > _LARGE, -g_kept, g_gone) / tl.maximum(p_kept, _LEAST_KEPT)
        effect = tl.where(p_kept < _LEAST_KEPT, -delta[:, None], effect)
        effect = tl.where(in_range[:, None], effect, 0.0)
        signed += tl.sum(effect, 0)
        absolute += tl.sum(tl.abs(effect), 0)
        squared += tl.sum(effect * effect, 0)
        mass += tl.sum(p_gone, 0)
    stride = n_q.to(tl.int64) * num_rules * num_heads
    at = sums_ptr + (h * num_rules + rule) * n_q + line
    tl.store(at, tl.load(at, mask=is_rule) + signed, mask=is_rule)
    tl.store(at + stride, tl.load(at + stride, mask=is_rule) + absolute, mask=is_rule)
    tl.store(at + 2 * stride, tl.load(at + 2 * stride, mask=is_rule) + squared, mask=is_rule)
    tl.store(at + 3 * stride, tl.load(at + 3 * stride, mask=is_rule) + mass, mask=is_rule)


def triton_block_effects(inputs: EffectInputs, spec: StatisticSpec, out: Tensor) -> None:
    """Add the sums of `block_effects` to `out`."""
    tensors, config = _arguments(inputs, spec.block_size)
    _, _, n_q, n_k = out.shape
    programs = inputs.q.shape[1] * n_q
    check_launch(programs, n_k, spec.block_size // config.steps)
    with torch.cuda.device_of(inputs.q):
        s2_block_effects_kernel[(programs,)](
            *tensors, out, *_strides(tensors), spec.softmax_scale * LOG2_E, *_sizes(inputs, spec), n_k,
            **constants(inputs.q, inputs.v, spec.block_size, config, spec.causal),
        )  # fmt: skip


def triton_rule_effects(inputs: EffectInputs, rules: Tensor, spec: StatisticSpec, out: Tensor) -> None:
    """Add the sums of `rule_effects` to `out`."""
    tensors, config = _arguments(inputs, spec.block_size)
    heads, num_rules, n_q, n_k = rules.shape
    rules = last_contiguous(rules).view(torch.uint8)
    programs = heads * n_q * -(-num_rules // RULES_AT_ONCE)
    check_launch(programs, n_k, spec.block_size // config.steps)
    with torch.cuda.device_of(inputs.q):
        s2_rule_effects_kernel[(programs,)](
            *tensors, rules, out, *_strides(tensors), *rules.stride()[:3],
            spec.softmax_scale * LOG2_E, *_sizes(inputs, spec), n_k, num_rules,
            RULES=RULES_AT_ONCE, **constants(inputs.q, inputs.v, spec.block_size, config, spec.causal),
        )  # fmt: skip


def _arguments(inputs: EffectInputs, block_size: int) -> tuple[tuple[Tensor, ...], Config]:
    q, v = inputs.q, inputs.v
    config = config_for("dq", block_size, q.shape[-1], v.shape[-1], q.dtype, shared_limit(q.device))
    views = (last_contiguous(x) for x in (q, inputs.k, v, inputs.dout))
    return (*views, inputs.lse.contiguous(), inputs.delta.contiguous()), config


def _strides(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(stride for x in tensors[:4] for stride in strides(x))


def _sizes(inputs: EffectInputs, spec: StatisticSpec) -> tuple[int, ...]:
    (b, heads, s_q, _), (kv_heads, s_k) = inputs.q.shape, inputs.k.shape[1:3]
    first, n_q = query_blocks(s_q, spec.query_offset, spec.block_size)
    return heads, heads // kv_heads, b, s_q, s_k, spec.query_offset, first, n_q


def constants(q: Tensor, v: Tensor, block_size: int, config: Config, causal: bool) -> dict[str, int]:
    """Return what both kernels are compiled for."""
    dim, v_dim = q.shape[-1], v.shape[-1]
    return {
        "DIM": dim,
        "V_DIM": v_dim,
        "PADDED_DIM": padded(dim),
        "PADDED_V_DIM": padded(v_dim),
        "BLOCK": block_size,
        "ROWS": config.rows,
        "STEPS": config.steps,
        "CAUSAL": causal,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
