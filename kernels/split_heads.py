"""Split a projection into heads and rotate them, in one pass.

Apart, a copy of the queries, a rotation in place and, in the backward, a concatenation of the gradients move twice the
bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fp_fusion import with_fp_fusion
from .launch import Launcher

_ELEMENTS = 512  # of a half head that a program loads at once: 8 bytes of each of 128 threads in bfloat16


@triton.jit
def _turn(source, target, cos, sin, columns, inside, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    first = tl.load(source + columns, mask=inside, other=0).to(cos.dtype)
    second = tl.load(source + columns + HALF, mask=inside, other=0).to(cos.dtype)
    tl.store(target + columns, first * cos - second * sin, mask=inside)
    tl.store(target + columns + HALF, second * cos + first * sin, mask=inside)


@triton.jit
def _copy(source, target, exists, START: tl.constexpr, STOP: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    columns = START + tl.arange(0, COLUMNS)[None]
    inside = exists & (columns < STOP)
    tl.store(target + columns, tl.load(source + columns, mask=inside), mask=inside)


@with_fp_fusion
@triton.jit
def _split_heads_kernel(  # type: ignore[no-untyped-def]
    packed, q, k, v, cosines, sines, tokens, batch,
    q_s, q_b, q_h, k_s, k_b, k_h, v_s, v_b, v_h,
    GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, HALF_COLUMNS: tl.constexpr, COLUMNS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Split and rotate one KV head's group; BACKWARD: rotate back and pack."""
    group = tl.program_id(0) % GROUPS
    token = (tl.program_id(0) // GROUPS).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    exists = token < tokens
    columns = tl.arange(0, HALF_COLUMNS)[None]
    inside = exists & (columns < HALF)
    cos = tl.load(cosines + token * HALF + columns, mask=inside, other=0)
    sin = tl.load(sines + token * HALF + columns, mask=inside, other=0)
    if BACKWARD:
        sin = -sin
    s, b = token // batch, token % batch
    packed += (token * GROUPS + group) * ((PER_GROUP + 2) * DIM)
    q += s * q_s + b * q_b + group * PER_GROUP * q_h
    k += s * k_s + b * k_b + group * k_h
    for head in range(PER_GROUP + 1):
        apart = tl.where(head < PER_GROUP, q + head * q_h, k)
        together = packed + head * DIM
        if BACKWARD:
            _turn(apart, together, cos, sin, columns, inside, HALF)
            if 2 * HALF < DIM:
                _copy(apart, together, exists, 2 * HALF, DIM, COLUMNS)
        else:
            _turn(together, apart, cos, sin, columns, inside, HALF)
            if 2 * HALF < DIM:
                _copy(together, apart, exists, 2 * HALF, DIM, COLUMNS)
    if BACKWARD:
        v += s * v_s + b * v_b + group * v_h
        _copy(v, packed + (PER_GROUP + 1) * DIM, exists, 0, DIM, COLUMNS)


_launch_kernel = Launcher(_split_heads_kernel)


def _launch(packed: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> None:
    length, batch, groups, width = packed.shape
    dim, half = q.shape[-1], cos.shape[-1]
    half_columns = triton.next_power_of_2(half)
    block = max(1, _ELEMENTS // half_columns)
    tokens = length * batch
    per_group, columns = width // dim - 2, triton.next_power_of_2(dim)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    _launch_kernel(
        (triton.cdiv(tokens, block) * groups, 1, 1),
        (
            packed, q, k, v, cos, sin, tokens, batch, *strides,
            groups, per_group, dim, half, block, half_columns, columns, backward,
        ),
    )  # fmt: skip


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, dim: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length, batch, groups, width = packed.shape
        q = packed.new_empty(length, batch, groups * (width // dim - 2), dim)
        k, v = packed.new_empty(length, batch, groups, dim), packed[..., width - dim :]
        _launch(packed, q, k, v, cos, sin, backward=False)
        ctx.save_for_backward(cos, sin)
        ctx.shape = packed.shape
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv = (x if x.stride(-1) == 1 else x.contiguous() for x in gradients)
        cos, sin = ctx.saved_tensors
        packed = dq.new_empty(ctx.shape)
        _launch(packed, dq, dk, dv, cos, sin, backward=True)
        return packed, None, None, None


def split_heads(packed: Tensor, dim: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split a projection into rotated queries and keys, and values.

    Arithmetic has the tables' dtype, and is rounded once.

    Args:
        packed: [s, b, h_kv, (h / h_kv + 2) · d]: of each KV head its queries, its key and its value, as Megatron's
            projection has them.
        dim: d.
        cos, sin: [s · b, r / 2], contiguous; the first r dimensions of a head are rotated, halves against each other.
    Returns:
        [s, b, h, d], [s, b, h_kv, d], and [s, b, h_kv, d], a view of `packed`.
    """
    q, k, v = _SplitHeads.apply(packed.contiguous(), dim, cos, sin)
    return q, k, v
