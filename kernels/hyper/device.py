"""Device functions that the kernels of HyperAttention share."""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def gather_tile(base, rows, stride, in_range, DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Load numbered rows of a matrix, zero where masked."""
    dims = tl.arange(0, PADDED_DIM)
    pointers = base + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    return tl.load(pointers, mask=in_range[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def bias_of(log_weights, keys, exist, sinks):
    """Return what to add to the keys' base-2 scores.

    It is -inf for sinks, which are read exactly, and for missing keys.
    """
    return tl.where(exist & (keys >= sinks), log_weights, float("-inf"))


@triton.jit
def outside_window(positions, keys, window_blocks, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """Return which keys lie outside a query's exact blocks.

    Causal: all keys are earlier than the query, and its own block is never among them. Else `window_blocks` is -1
    without any window.
    """
    block = positions // BLOCK
    first = (block - window_blocks) * BLOCK
    if CAUSAL:
        return keys < first
    return (keys < first) | (keys >= (block + window_blocks + 1) * BLOCK)


@triton.jit
def level_of(level, length, samples, SHORTEST: tl.constexpr, CAUSAL: tl.constexpr):
    """Return size, count, period, shift, samples, as `settings.levels`."""
    if CAUSAL:
        size = SHORTEST << level
        count = (length + size - 1) // (2 * size)
        period = 2 * size
        shift = size
    else:
        size = length + 0
        count = length * 0 + 1
        period = length * 0
        shift = length * 0
    return size, count, period, shift, tl.minimum(samples, size)


@triton.jit
def interval_of(first, size, period, CAUSAL: tl.constexpr):
    """Return a query tile's interval, and 1 if it reads it."""
    if CAUSAL:
        return first // period, (first // size) % 2
    return first * 0, first * 0 + 1
