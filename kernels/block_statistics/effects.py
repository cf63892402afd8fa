"""Public operations: first-order effect on the loss of removing key blocks.

Removing a set R of keys from row i leaves the others' weights, divided by their sum. With P_R = sum of A_ij over R,
dP = dout v^T and delta_i = dout_i . out_i = sum_j A_ij dP_ij, the loss then changes by

    E_iR = (P_R * delta_i - sum_R A_ij dP_ij) / (1 - P_R) = sum_R A_ij (delta_i - dP_ij) / (1 - P_R),

exactly so if the loss is linear in the row's output, whatever P_R. E > 0: removing R harms. E does not add over blocks:
a rule that removes many has one set R in each row, and one division.

In float32 neither 1 - P_R nor the sum over R holds its digits where P_R is nearly 1. The sums over the kept keys do:
E_iR = sum_kept A_ij (dP_ij - delta_i) / sum_kept A_ij. This form is taken where P_R > 5/8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_triton_dtype, scale_of
from ..attention import Backend, resolve_backend
from ..spec import Format, shape_bhsd, to_bhsd
from .blocks import check_call, query_blocks
from .reference import reference_block_effects, reference_rule_effects
from .spec import EffectInputs, StatisticSpec

SUMS = ("signed", "absolute", "squared", "mass")


def output_delta(out: Tensor, dout: Tensor, *, format: Format = "sbhd") -> Tensor:
    """Compute delta = rowsum(out * dout), float32 [b, H, s_q].

    out and dout are attention's output and the loss's gradient with respect to it, in `format`. float64 stays float64.
    """
    precise = torch.promote_types(out.dtype, torch.float32)
    return (to_bhsd(out.detach(), format).to(precise) * to_bhsd(dout.detach(), format).to(precise)).sum(-1)


def block_effects(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    dout: Tensor,
    delta: Tensor,
    *,
    block_size: int,
    softmax_scale: float | None = None,
    causal: bool = True,
    query_offset: int = 0,
    format: Format = "sbhd",
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Sum the effect of removing each key block over query blocks' rows.

    E is of one row of one head of one sequence with one key block removed (see the module). The four sums over the rows
    of a query block and over the sequences are, in the order of `SUMS`: E, |E|, E^2, and the removed probability P. The
    square is of each row's own E, before any sum over rows, sequences or heads: a cost of second order, which ranked
    blocks best where signed sums cancel. Half of it estimates the change of a calibrated model's loss.

    A row whose only key block is removed (others' sum below 1e-30) has E = 0: it can't be removed there. So have rows
    without any visible key.

    Args:
        q: [s_q, b, H, d] in format "sbhd"; k, v: [s_k, b, H_kv, d] and [.., d_v], as in `block_sparse_attention`.
        lse: natural log-sum-exp float32 [b, H, s_q] of attention over all visible keys. What is masked already has no
            effect to measure.
        dout: gradient of the loss with respect to the output, in q's dtype and shape but for d_v. Give the gradient of
            a summed loss, not of a mean over many tokens: squares below 1e-38 are 0.
        delta: rowsum(out * dout), float32 [b, H, s_q] (`output_delta`).
        causal, query_offset, softmax_scale, format, backend: as in `block_sparse_attention`.
        out: float32 [4, H, n_q, n_k] of an earlier call, which the sums are added to in place and which is returned.

    Returns:
        float32 [4, H, n_q, n_k] (float64 for float64). Row r is query block query_offset // block_size + r.

    The same in every run: there are no atomic sums. No n x n tensor exists.

    Raises:
        ValueError: arguments don't fit together; the message names the argument and the remedy.
    """
    inputs = _checked_views(EffectInputs(q, k, v, lse, dout, delta), format, block_size, query_offset)
    spec = StatisticSpec(block_size, scale_of(softmax_scale, q.shape[-1]), causal, query_offset)
    out = _accumulator(out, (4, *_result_shape(inputs, spec)), lse)
    with torch.no_grad():
        if resolve_backend(backend, q.device) == "torch":
            out += reference_block_effects(inputs.with_products_in(lse.dtype), spec)
        else:
            check_triton_dtype(q, "q, k, v and dout")
            # imported here so that a process loads only the backend that it uses
            from .effects_kernel import triton_block_effects

            triton_block_effects(inputs, spec, out)
    return out


def rule_effects(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    dout: Tensor,
    delta: Tensor,
    rules: Tensor,
    *,
    block_size: int,
    softmax_scale: float | None = None,
    causal: bool = True,
    query_offset: int = 0,
    format: Format = "sbhd",
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Sum the effect of candidate rules, each a block mask, over rows.

    As `block_effects`, but all blocks that a rule drops are removed at once, with one division a row. A row that a rule
    leaves without any key (kept sum below 1e-30) has output 0, as in `block_sparse_attention`: there E = -delta.

    Args:
        rules: bool [H or 1, R, n_q, n_k], True where a rule keeps the block; 1: the same rules for all heads. Query
            blocks are those of the result, key blocks all that hold keys.
        out: float32 [4, H, R, n_q] of an earlier call, which the sums are added to in place and which is returned.

    Returns:
        float32 [4, H, R, n_q] (float64 for float64): the four sums of `SUMS` for each query block; P is what the rule
        drops. Sum over n_q for a rule's cost.

    Raises:
        ValueError: arguments don't fit together; the message names the argument and the remedy.
    """
    inputs = _checked_views(EffectInputs(q, k, v, lse, dout, delta), format, block_size, query_offset)
    spec = StatisticSpec(block_size, scale_of(softmax_scale, q.shape[-1]), causal, query_offset)
    heads, n_q, n_k = _result_shape(inputs, spec)
    rules = _checked_rules(rules, heads, n_q, n_k, q.device)
    out = _accumulator(out, (4, heads, rules.shape[1], n_q), lse)
    with torch.no_grad():
        if resolve_backend(backend, q.device) == "torch":
            out += reference_rule_effects(inputs.with_products_in(lse.dtype), rules, spec)
        else:
            check_triton_dtype(q, "q, k, v and dout")
            from .effects_kernel import triton_rule_effects

            triton_rule_effects(inputs, rules, spec, out)
    return out


def _checked_views(given: EffectInputs, format: Format, block_size: int, query_offset: int) -> EffectInputs:
    """Check tensors in `format`, and return views without gradients."""
    tensors = {"q": given.q, "k": given.k, "v": given.v, "dout": given.dout}
    check_call(tensors, {"lse": given.lse, "delta": given.delta}, format, block_size, query_offset)
    _check_values(tensors, format)
    views = {name: to_bhsd(x.detach(), format) for name, x in tensors.items()}
    return EffectInputs(**views, lse=given.lse.detach(), delta=given.delta.detach())


def _result_shape(inputs: EffectInputs, spec: StatisticSpec) -> tuple[int, int, int]:
    """Return the numbers of heads, query blocks and key blocks."""
    n_q = query_blocks(inputs.q.shape[2], spec.query_offset, spec.block_size)[1]
    return inputs.q.shape[1], n_q, -(-inputs.k.shape[2] // spec.block_size)


def _check_values(tensors: dict[str, Tensor], format: Format) -> None:
    """Check the shapes of v and dout.

    v must have k's heads and rows; dout must have q's, and v's width.
    """
    (b, heads, s_q, _), k, v = (shape_bhsd(tensors[name], format) for name in ("q", "k", "v"))
    dout = shape_bhsd(tensors["dout"], format)
    if v[:3] != k[:3] or v[3] == 0 or dout != (b, heads, s_q, v[3]):
        raise ValueError(
            f"shapes don't match in format {format!r}: k {list(tensors['k'].shape)}, v {list(tensors['v'].shape)}, "
            f"dout {list(tensors['dout'].shape)}; v has k's shape and dout q's, but for v's head dimension"
        )


def _checked_rules(rules: Tensor, heads: int, n_q: int, n_k: int, device: torch.device) -> Tensor:
    if rules.dtype != torch.bool or rules.dim() != 4 or rules.device != device:
        raise ValueError(
            f"rules must be bool [{heads} or 1, rules, {n_q}, {n_k}] on {device}, got {rules.dtype} "
            f"{list(rules.shape)} on {rules.device}"
        )
    of_heads, number, *blocks = rules.shape
    if of_heads not in (1, heads) or blocks != [n_q, n_k] or number < 1:
        raise ValueError(f"rules must be [{heads} or 1, rules, {n_q}, {n_k}], got {list(rules.shape)}")
    return rules.expand(heads, number, n_q, n_k)


def _accumulator(out: Tensor | None, shape: tuple[int, ...], lse: Tensor) -> Tensor:
    """Return `out`, or zeros of this shape if it is None.

    The result has lse's dtype and is on its device.
    """
    if out is None:
        return torch.zeros(shape, dtype=lse.dtype, device=lse.device)
    if out.shape != shape or out.dtype != lse.dtype or out.device != lse.device or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {lse.dtype} {list(shape)} on {lse.device}, got {out.dtype} {list(out.shape)} on "
            f"{out.device}: pass what an earlier call with these shapes returned"
        )
    return out
