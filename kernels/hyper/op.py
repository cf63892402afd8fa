"""Public operation: HyperAttention, attention in near-linear time."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ..arguments import check_alike, check_groups, check_triton_dtype, scale_of
from ..attention import Backend, resolve_backend
from ..spec import AttentionSpec, Format, shape_bhsd, to_bhsd
from .hashing import hash_ranks
from .reference import reference_hyper_attention
from .settings import HyperSettings


@overload
def hyper_attention(
    q: Tensor, k: Tensor, v: Tensor, settings: HyperSettings, projection_seeds: Tensor, sample_seeds: Tensor, *,
    softmax_scale: float | None = ..., causal: bool = ..., format: Format = ..., return_lse: Literal[False] = ...,
    backend: Backend = ..., split_columns: bool = ...,
) -> Tensor: ...  # fmt: skip


@overload
def hyper_attention(
    q: Tensor, k: Tensor, v: Tensor, settings: HyperSettings, projection_seeds: Tensor, sample_seeds: Tensor, *,
    softmax_scale: float | None = ..., causal: bool = ..., format: Format = ..., return_lse: Literal[True],
    backend: Backend = ..., split_columns: bool = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def hyper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    settings: HyperSettings,
    projection_seeds: Tensor,
    sample_seeds: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    format: Format = "sbhd",
    return_lse: bool = False,
    backend: Backend = "auto",
    split_columns: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Estimate softmax attention from exact keys, buckets of similar keys, and samples.

    A query reads exactly its own interval of `settings.shortest` tokens, a window and the first keys. The rest of its
    past is tiled by complete, aligned intervals, whose keys are sorted by an angular hash. In each it reads the bucket
    of its own hash exactly, and of the other keys a sample, weighted by the inverse of the probability of being drawn:
    numerator and denominator of the softmax are unbiased. One softmax covers all parts, and gradients are exact.
    Outputs depend on no later token.

    Args:
        q: [n, b, H, d] in format "sbhd" ([b, n, H, d] in "bshd", [b, H, n, d] in "bhsd").
        k, v: [n, b, H_kv, d] and [n, b, H_kv, d_v], in q's dtype. H is a multiple of H_kv: query head h reads KV head
            h // (H // H_kv). Keys are hashed and sampled once per KV head, queries of a group hash each by itself.
        projection_seeds, sample_seeds: int64 [H_kv] on q's device: one seed of a KV head's hash, one of its samples.
            Equal seeds give equal results; nothing else is drawn. Sequences of a batch share them.
        softmax_scale: above 0; default 1 / sqrt(d).
        causal: mask keys after the query. False: one interval of all keys (above `shortest`), and a window both ways.
        backend: see `resolve_backend`; exact keys take Hopper's kernels where possible.
        split_columns: of the exact keys, as in `block_sparse_attention`.
        return_lse: also return the natural log-sum-exp of weighted scores, float32 [b, H, n] (float64 for float64).

    torch.compile traces the kernels as one operator, which makes the plan (hashes and their order) once more for the
    backward. Activation checkpointing needs ``use_reentrant=False``.

    Returns:
        Output with q's shape and d_v in place of d, contiguous; with `return_lse` also the log-sum-exp. Both are
        differentiable.

    Raises:
        ValueError: arguments don't fit together; the message names the argument and the remedy.
    """
    check_arguments(q, k, v, projection_seeds, sample_seeds, format)
    resolved = resolve_backend(backend, q.device)
    scale = scale_of(softmax_scale, q.shape[-1])
    if resolved != "torch":
        check_triton_dtype(q, "q, k and v")
        # imported here so that a process loads only the backend that it uses
        from .custom_op import traced
        from .triton_backend import triton_hyper_attention

        spec = AttentionSpec(scale, causal, 0, None, format, resolved == "portable", split_columns)
        attend = traced if torch.compiler.is_compiling() else triton_hyper_attention
        out, lse = attend(q, k, v, settings, projection_seeds, sample_seeds, spec)
        return (out, lse) if return_lse else out
    # in the inputs' dtype, as the kernels hash
    ranks = hash_ranks(to_bhsd(q, format), to_bhsd(k, format), projection_seeds, settings.projections)
    precise = torch.promote_types(q.dtype, torch.float32)
    out, lse = reference_hyper_attention(
        q.to(precise),
        k.to(precise),
        v.to(precise),
        settings,
        projection_seeds,
        sample_seeds,
        softmax_scale=scale,
        causal=causal,
        format=format,
        ranks=ranks,
    )
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def check_arguments(
    q: Tensor, k: Tensor, v: Tensor, projection_seeds: Tensor, sample_seeds: Tensor, format: Format
) -> None:
    """Check shapes, dtypes and devices; raise ValueError on a mismatch."""
    check_alike({"q": q, "k": k, "v": v}, format)
    (b, heads, length, dim), k_shape = shape_bhsd(q, format), shape_bhsd(k, format)
    kv_heads = k_shape[1]
    if k_shape != (b, kv_heads, length, dim) or shape_bhsd(v, format)[:3] != k_shape[:3] or 0 in (dim, kv_heads):
        raise ValueError(
            f"shapes don't match in format {format!r}: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; q and "
            "k share batch, length and head dimension, k and v all but the head dimension"
        )
    check_groups(heads, kv_heads)
    for name, seeds in (("projection_seeds", projection_seeds), ("sample_seeds", sample_seeds)):
        if seeds.dtype != torch.int64 or seeds.shape != (kv_heads,) or seeds.device != q.device:
            raise ValueError(
                f"{name} must be int64 [{kv_heads}] on {q.device}, one for each KV head, got {seeds.dtype} "
                f"{list(seeds.shape)} on {seeds.device}"
            )
