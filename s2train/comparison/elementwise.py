"""Checks and times norms, sums, SwiGLU, rotation and loss on GPUs.

Errors are relative errors of output and gradients against float64; a library's may be twice those of torch in the same
dtype. Times are those of forward and backward at the sizes of the 1B model over 32k tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from liger_kernel.ops import LigerFusedAddRMSNormFunction, LigerRMSNormFunction
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from s2train.kernels.benchmarks.timing import Clock, time_passes
from s2train.kernels.relative_error import relative_error
from s2train.megatron.fused import swiglu, swiglu_launched_by_liger
from s2train.megatron.in_place_loss import loss_in_place
from s2train.megatron.liger_losses import linear_loss, vocab_parallel_loss
from s2train.megatron.rotation import Rotation
from s2train.megatron.summed_norm import sum_and_norm

_EPSILON = 1e-5
_FLOOR = 3e-7
Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Operation:
    """One operation and its implementations.

    Attributes:
        inputs: makes its tensors from a number of tokens and a dtype; floating-point tensors get gradients.
        exact: plain torch implementation for any dtype; returns a tensor or several.
        implementations: name -> function; the first one is used if no library is installed.
    """

    name: str
    inputs: Callable[[int, torch.dtype], list[Tensor]]
    exact: Callable[..., Outputs]
    implementations: dict[str, Callable[..., Outputs]]


def _random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, _EPSILON)


def _sum_and_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _norm(total, weight), total


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def operations(hidden: int, ffn: int, vocabulary: int, heads: int, kv_heads: int) -> Iterator[Operation]:
    """Yield the operations of a layer and the model's end."""
    yield from _norms(hidden)
    yield Operation(
        "swiglu",
        lambda n, t: [_random(n, 1, 2 * ffn, dtype=t)],
        _swiglu,
        {
            "megatron": lambda x: bias_swiglu_impl(x, None),
            "liger": swiglu,
            "liger's own launch": swiglu_launched_by_liger,
        },
    )
    yield from _losses(hidden, vocabulary)
    yield from _rotations(heads, kv_heads, hidden // heads)


def _norms(hidden: int) -> Iterator[Operation]:
    yield Operation(
        "norm",
        lambda n, t: [_random(n, 1, hidden, dtype=t), 1 + _random(hidden, dtype=t, scale=0.1)],
        _norm,
        {"torch": _norm, "liger": _liger_norm},
    )
    yield Operation(
        "sums",
        lambda n, t: [
            _random(n, 1, hidden, dtype=t),
            _random(n, 1, hidden, dtype=t),
            1 + _random(hidden, dtype=t, scale=0.1),
        ],
        _sum_and_norm,
        {
            "torch": _sum_and_norm,
            "liger": lambda x, r, w: sum_and_norm(x, r, w, _EPSILON),
            "liger's own launch": lambda *xs: LigerFusedAddRMSNormFunction.apply(*xs, _EPSILON, 0.0, "gemma", False),
        },
    )


def _losses(hidden: int, vocabulary: int) -> Iterator[Operation]:
    group = parallel_state.get_tensor_model_parallel_group()
    yield Operation(
        "loss liger",
        lambda n, t: [_random(n, 1, vocabulary, dtype=t), torch.randint(vocabulary, (n, 1), device="cuda")],
        _loss,
        {
            "megatron": vocab_parallel_cross_entropy,
            "megatron fused": lambda x, y: fused_vocab_parallel_cross_entropy(x, y, group),
            "liger": lambda x, y: vocab_parallel_loss(x, y, group),
        },
    )
    yield Operation(
        "loss in_place",
        lambda n, t: [_random(n, 1, vocabulary, dtype=t), torch.randint(vocabulary, (n, 1), device="cuda")],
        _loss,
        {
            "megatron": vocab_parallel_cross_entropy,
            "liger": loss_in_place,
            "liger, not in place": lambda x, y: vocab_parallel_loss(x, y, group),
        },
    )
    yield Operation(
        "loss linear",
        lambda n, t: [
            _random(n, 1, hidden, dtype=t),
            _random(vocabulary, hidden, dtype=t, scale=hidden**-0.5),
            torch.randint(vocabulary, (n, 1), device="cuda"),
        ],
        lambda x, w, y: _loss(x @ w.T, y),
        {
            "megatron": lambda x, w, y: vocab_parallel_cross_entropy(x @ w.T, y),
            "megatron fused": lambda x, w, y: fused_vocab_parallel_cross_entropy(x @ w.T, y, group),
            "liger": linear_loss,
            "liger, logits kept": lambda x, w, y: vocab_parallel_loss(x @ w.T, y, group),
        },
    )


def _rotations(heads: int, kv_heads: int, dim: int) -> Iterator[Operation]:
    """Yield RoPE of queries, and RoPE while the projection is split."""

    def rotated(tokens: int, dtype: torch.dtype) -> list[Tensor]:
        """Make queries as a part of the projection, as in the layer."""
        projected = _random(tokens, 1, kv_heads, (heads // kv_heads + 2) * dim, dtype=dtype)
        return [projected[..., : heads // kv_heads * dim].reshape(tokens, 1, heads, dim)]

    angles = _angles(dim)
    rotation = Rotation()
    compiled = torch.compile(_apply_rotary_pos_emb_bshd, dynamic=False)

    yield Operation(
        "rotation",
        rotated,
        lambda x: _apply_rotary_pos_emb_bshd(x, angles(len(x)).to(torch.promote_types(x.dtype, torch.float32))),
        {
            "megatron": lambda x: _apply_rotary_pos_emb_bshd(x, angles(len(x))),
            "compiled": lambda x: compiled(x, angles(len(x))),
            "liger": lambda x: rotation(x, x[:, :, :kv_heads].detach(), angles(len(x)))[0],
            **_te_rotation(angles),
        },
    )

    def split(turn: Callable[[Tensor, Tensor, Tensor], Iterable[Tensor]]) -> Callable[[Tensor], tuple[Tensor, ...]]:
        def function(packed: Tensor) -> tuple[Tensor, ...]:
            query, key, value = _split(packed, dim)
            turned = turn(query, key, angles(len(packed)).to(torch.promote_types(packed.dtype, torch.float32)))
            return (*turned, value)

        return function

    apart = split(lambda q, k, a: (_apply_rotary_pos_emb_bshd(x, a) for x in (q, k)))
    yield Operation(
        "split",
        lambda n, t: [_random(n, 1, kv_heads, (heads // kv_heads + 2) * dim, dtype=t)],
        apart,
        {
            "megatron": apart,
            "s2train": lambda packed: rotation.split(packed, dim, angles(len(packed))),
            "liger": split(rotation),
        },
    )


def _split(packed: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a projection into queries, keys and values, as Megatron does."""
    query, key, value = packed.split([packed.shape[-1] - 2 * dim, dim, dim], dim=3)
    return query.reshape(*packed.shape[:2], -1, dim), key, value


def _angles(dim: int) -> Callable[[int], Tensor]:
    @cache
    def angles(tokens: int) -> Tensor:
        """Angles like those of Megatron's rotary embedding: fp32 [tokens, 1, 1, dim]."""
        frequencies = 10_000.0 ** (-torch.arange(0, dim, 2, device="cuda") / dim)
        half = torch.outer(torch.arange(tokens, device="cuda").float(), frequencies)
        return torch.cat((half, half), dim=-1)[:, None, None]

    return angles


def _liger_norm(x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = LigerRMSNormFunction.apply(x, weight, _EPSILON, 0.0, "gemma", False, None)
    return out


def _te_rotation(angles: Callable[[int], Tensor]) -> dict[str, Callable[..., Tensor]]:
    try:
        from megatron.core.extensions.transformer_engine import fused_apply_rotary_pos_emb
    except ImportError:
        return {}
    return {"te": lambda x: fused_apply_rotary_pos_emb(x, angles(len(x)))}


def _outputs(function: Callable[..., Outputs], inputs: Sequence[Tensor]) -> list[Tensor]:
    found = function(*inputs)
    return [found] if isinstance(found, Tensor) else list(found)


def check(operation: Operation, dtype: torch.dtype, tokens: int = 2311) -> list[dict[str, Any]]:
    """Check each implementation.

    By default on an odd number of tokens, several for each program of the sums' backward. A row holds its errors, the
    limits set by the first implementation, and whether two runs are equal bit for bit.
    """
    inputs = operation.inputs(tokens, dtype)
    douts = [torch.randn_like(out, dtype=torch.float32) for out in _outputs(operation.exact, inputs)]

    def results(function: Callable[..., Outputs], as_dtype: torch.dtype) -> list[Tensor]:
        # copies, since Megatron's loss and Liger's SwiGLU and rotation overwrite their inputs and gradients
        floats = [x.is_floating_point() for x in inputs]
        cast = [
            x.detach().to(as_dtype, copy=True).requires_grad_() if is_float else x
            for x, is_float in zip(inputs, floats, strict=True)
        ]
        outs = _outputs(function, cast)
        leaves = [x for x in cast if x.requires_grad]
        gradients = [dout.to(out.dtype, copy=True) for dout, out in zip(douts, outs, strict=True)]
        return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, gradients)]

    exact = results(operation.exact, torch.float64)
    rows, limits = [], None
    for name, function in operation.implementations.items():
        row: dict[str, Any] = {"operation": operation.name, "way": name, "dtype": str(dtype).removeprefix("torch.")}
        try:
            found, again = results(function, dtype), results(function, dtype)
            errors = [relative_error(x, y) for x, y in zip(found, exact, strict=True)]
            limits = [2 * error + _FLOOR for error in errors] if limits is None else limits
            row |= {"errors": errors, "limits": limits}
            row["ok"] = all(error <= limit for error, limit in zip(errors, limits, strict=True))
            row["same bits"] = all(x.equal(y) for x, y in zip(found, again, strict=True))
        except Exception as error:
            row |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
        rows.append(row)
    return rows


def measure(operation: Operation, clock: Clock, tokens: int = 32768) -> list[dict[str, Any]]:
    """Time each implementation.

    A row holds ms of forward, backward and both, and peak bytes without the inputs.
    """
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in operation.inputs(tokens, torch.bfloat16)]
    leaves = [x for x in inputs if x.requires_grad]
    rows = []
    for name, function in operation.implementations.items():
        row: dict[str, Any] = {"operation": operation.name, "way": name, "tokens": tokens}
        try:
            outs = _outputs(function, inputs)
            douts = [torch.randn_like(out) for out in outs]
            torch.autograd.grad(outs, leaves, douts)
            del outs
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            backward = partial(torch.autograd.grad, inputs=leaves, grad_outputs=douts)
            row |= time_passes(partial(_outputs, function, inputs), backward, clock, budget_ms=150)
            row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
        torch.cuda.empty_cache()
    return rows
