"""Public operation: list the best key blocks of a group's heads."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import Backend, resolve_backend
from .candidates import MASKED, combine_heads, mark_candidates


def select_blocks(
    scores: Tensor,
    rows: Tensor,
    counts: Tensor,
    *,
    window: int,
    sinks: int,
    slots: int,
    normalize: bool,
    backend: Backend = "auto",
) -> Tensor:
    """Select each query block's key blocks.

    The candidates of query block r are the key blocks from `sinks` to r - `window`. A candidate's score is the
    log-sum-exp over the group's heads (`combine_heads`). Of candidates with equal scores, the earlier one is preferred;
    NaN is the best score.

    Args:
        scores: [b, h_kv, group, rows, n_k], of each head. What is no candidate is not read.
        rows: int64 [1 or b, rows], number of each query block; negative: none, and an empty list.
        counts: int32 [1 or b, rows], how many candidates to select, at most `slots` and at most as there are.
        window: last blocks, always kept, with the query block's own; at least 1.
        sinks: first blocks, always kept.
        normalize: turn each head's scores to log-probabilities over the candidates first.
        backend: as in `block_sparse_attention`.

    Returns:
        int32 [b, h_kv, rows, sinks + slots + window], -1 where unused: sinks, candidates from the best on, and the
        window. A sink or candidate is in no other part. The query block's own block is in the last slot.

    The same in every run. The Triton kernel reads each candidate's scores once and writes the lists alone.

    Raises:
        ValueError: arguments don't fit together.
    """
    _check(scores, rows, counts, window, sinks, slots)
    with torch.no_grad():
        if resolve_backend(backend, scores.device) == "torch":
            return reference_select_blocks(scores.detach(), rows, counts, window, sinks, slots, normalize)
        if scores.dtype != torch.float32:
            raise ValueError(f"scores are {scores.dtype}: the triton backend takes float32; cast them")
        # imported here so that a process loads only the backend that it uses
        from .select_blocks_kernel import triton_select_blocks

        return triton_select_blocks(scores.detach(), rows, counts, window, sinks, slots, normalize)


def reference_select_blocks(
    scores: Tensor, rows: Tensor, counts: Tensor, window: int, sinks: int, slots: int, normalize: bool
) -> Tensor:
    """Compute `select_blocks` in plain torch, by a stable sort."""
    rows, counts = rows[:, None], counts[:, None]
    candidates = mark_candidates(rows, scores.shape[-1], window, sinks)
    combined = combine_heads(scores, candidates, normalize).masked_fill(~candidates, MASKED)
    ranked, block = (x[..., :slots] for x in combined.sort(dim=-1, descending=True, stable=True))
    unused = (ranked < MASKED / 2) | (torch.arange(block.shape[-1], device=rows.device) >= counts[..., None])
    chosen = torch.nn.functional.pad(block.masked_fill(unused, -1), (0, slots - block.shape[-1]), value=-1)
    row = rows[..., None]
    sink = torch.arange(sinks, device=rows.device)
    first = torch.where(sink <= row - window, sink, -1)
    last = (row - torch.arange(window - 1, -1, -1, device=rows.device)).clamp_min(-1)
    shape = chosen.shape[:-1]
    return torch.cat([first.expand(*shape, -1), chosen, last.expand(*shape, -1)], -1).int()


def _check(scores: Tensor, rows: Tensor, counts: Tensor, window: int, sinks: int, slots: int) -> None:
    if scores.dim() != 5 or 0 in scores.shape or not scores.dtype.is_floating_point:
        raise ValueError(
            "scores must be floating point [batch, KV heads, group, rows, key blocks], all at least 1, got "
            f"{scores.dtype} {list(scores.shape)}"
        )
    for name, x, dtype in (("rows", rows, torch.int64), ("counts", counts, torch.int32)):
        if x.dtype != dtype or x.shape not in ((1, scores.shape[3]), (scores.shape[0], scores.shape[3])):
            raise ValueError(
                f"{name} must be {dtype} [1 or {scores.shape[0]}, {scores.shape[3]}], one number for each row of the "
                f"scores, got {x.dtype} {list(x.shape)}"
            )
        if x.device != scores.device:
            raise ValueError(f"scores are on {scores.device} but {name} on {x.device}: move them to one device")
    for name, number, least in (("window", window, 1), ("sinks", sinks, 0), ("slots", slots, 1)):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
