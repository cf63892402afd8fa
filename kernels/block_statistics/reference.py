"""Reference statistics in plain torch; also the CPU backend.

They are computed for one key block at a time. All arithmetic is in q's dtype: float64 makes these the oracles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..topk_layout import TopKLayout
from .blocks import block_of_row, query_blocks, rows_of_block
from .spec import EffectInputs, StatisticSpec

LEAST_KEPT = 1e-30  # below it nothing is left of a row
# Above it a removed block's effect comes from the kept sums. Above 1/2, so that rounding leaves one such block a row.
LARGE = 0.625


def reference_mass(q: Tensor, k: Tensor, lse: Tensor, spec: StatisticSpec, layout: TopKLayout | None) -> Tensor:
    """Compute `block_mass` of views q, k [b, h, s, d].

    The largest temporaries are [b, H, s_q, block] and [b, H, s_q, n_k].
    """
    (b, heads, s_q, _), (kv_heads, s_k), size = q.shape, k.shape[1:3], spec.block_size
    p = torch.stack(
        [probabilities(q, k[:, :, j : j + size], lse, spec, first_key=j).sum(-1) for j in range(0, s_k, size)], -1
    )
    first, count = query_blocks(s_q, spec.query_offset, size)
    place = _block_of_row(q, spec)
    rows = rows_of_block(s_q, spec.query_offset, size, q.device)
    mass = p.new_zeros(b, heads, count, p.shape[-1]).index_add_(2, place, p) / rows[:, None]
    if layout is not None:
        indices = layout.indices[:, :, first : first + count]
        indices = indices.repeat_interleave(heads // layout.num_lists, 1)
        # blocks after the last key have no mass
        mass = torch.nn.functional.pad(mass, (0, max(0, layout.num_key_blocks - mass.shape[-1])))
        mass = mass.gather(-1, indices.clamp(min=0).long()).masked_fill(~first_mentions(indices), 0)
    return mass.unflatten(1, (kv_heads, -1)).mean(2)


def probabilities(q: Tensor, keys: Tensor, lse: Tensor, spec: StatisticSpec, first_key: int) -> Tensor:
    """Compute A [b, H, s_q, n] of n keys from position `first_key`.

    Rows with log-sum-exp -inf have 0.
    """
    group = q.shape[1] // keys.shape[1]
    scores = q @ keys.repeat_interleave(group, 1).mT * spec.softmax_scale
    hidden = (lse == -torch.inf)[..., None]
    if spec.causal:
        position = torch.arange(q.shape[2], device=q.device) + spec.query_offset
        key = torch.arange(keys.shape[2], device=q.device) + first_key
        hidden = hidden | (key > position[:, None])
    return (scores - lse[..., None]).masked_fill(hidden, -torch.inf).exp()


def first_mentions(indices: Tensor) -> Tensor:
    """Mark the first slot of each block in a list.

    Slots that are not in use are not marked.
    """
    slot = torch.arange(indices.shape[-1], device=indices.device)
    same = (indices[..., :, None] == indices[..., None, :]) & (slot[None, :] < slot[:, None])
    return (indices >= 0) & ~same.any(-1)


def reference_block_effects(inputs: EffectInputs, spec: StatisticSpec) -> Tensor:
    """Compute the sums of `block_effects`: [4, H, n_q, n_k]."""
    p, h = _removed(inputs, spec)
    # sums over the other blocks, added up: not 1 - p, which cancels
    others = 1 - torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    effect = _effect(p, h, p @ others, h @ others, torch.zeros_like(p))
    return _sums(effect, p, _block_of_row(inputs.q, spec))


def reference_rule_effects(inputs: EffectInputs, rules: Tensor, spec: StatisticSpec) -> Tensor:
    """Compute the sums of `rule_effects`: [4, H, R, n_q]."""
    p, h = _removed(inputs, spec)
    place = _block_of_row(inputs.q, spec)
    kept = rules[:, :, place].to(p.dtype)  # [H, R, s_q, n_k]
    p_gone, h_gone, p_kept, h_kept = (
        torch.einsum("bhin,hrin->bhir", x, weight) for weight in (1 - kept, kept) for x in (p, h)
    )
    nothing_left = -inputs.delta.masked_fill(inputs.lse == -torch.inf, 0)[..., None].expand_as(p_gone)
    return _sums(_effect(p_gone, h_gone, p_kept, h_kept, nothing_left), p_gone, place).mT.contiguous()


def _removed(inputs: EffectInputs, spec: StatisticSpec) -> tuple[Tensor, Tensor]:
    """Compute sum A and sum A (delta - dP) per key block.

    Both are [b, H, s_q, n_k].
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    p, h, group = [], [], q.shape[1] // k.shape[1]
    for j in range(0, k.shape[2], spec.block_size):
        block = slice(j, j + spec.block_size)
        a = probabilities(q, k[:, :, block], inputs.lse, spec, first_key=j)
        dp = inputs.dout @ v[:, :, block].repeat_interleave(group, 1).mT
        p.append(a.sum(-1))
        h.append((a * (inputs.delta[..., None] - dp)).sum(-1))
    return torch.stack(p, -1), torch.stack(h, -1)


def _block_of_row(q: Tensor, spec: StatisticSpec) -> Tensor:
    return block_of_row(q.shape[2], spec.query_offset, spec.block_size, q.device)


def _effect(p: Tensor, h: Tensor, p_kept: Tensor, h_kept: Tensor, nothing_left: Tensor) -> Tensor:
    """Combine the sums over removed and kept keys."""
    effect = torch.where(p > LARGE, -h_kept, h) / p_kept.clamp(min=LEAST_KEPT)
    return torch.where(p_kept < LEAST_KEPT, nothing_left, effect)


def _sums(effect: Tensor, p: Tensor, place: Tensor) -> Tensor:
    """Sum effects and p over sequences and a query block's rows.

    Both are [b, H, s_q, x]. The sums [4, H, n_q, x] are those of the effect, of its absolute value and square, and of
    p.
    """
    values = torch.stack([effect, effect.abs(), effect.square(), p]).sum(1)
    return values.new_zeros(*values.shape[:2], int(place[-1]) + 1, values.shape[-1]).index_add_(2, place, values)
