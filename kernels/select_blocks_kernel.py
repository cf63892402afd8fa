"""Triton kernel of `select_blocks`: one program for each list.

A program holds one row of scores in registers. It adds the heads of the group, then takes the best candidate as often
as the list has room. Non-candidates are not loaded, so that a causal row costs the bytes of its past alone.
"""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import spec
from .candidates import MASKED
from .fp_fusion import with_fp_fusion
from .interpreter import repair_interpreter
from .tiles import check_launch

if os.environ.get("TRITON_INTERPRET") == "1":
    repair_interpreter()

_MASKED = tl.constexpr(MASKED)
_COLUMNS_OF_WARP = 1024  # 32 scores for each thread
_MOST_WARPS = 16


@triton.jit
def _log_add(a, b):
    """Compute log(exp(a) + exp(b)); equal infinities are kept."""
    apart = tl.where(a == b, 0.0, -tl.abs(a - b))
    return tl.maximum(a, b) + tl.log(1.0 + tl.exp(apart))


@with_fp_fusion
@triton.jit(
    do_not_specialize=[
        "scores_batch",
        "scores_kv_head",
        "scores_head",
        "scores_row",
        "rows_batch",
        "counts_batch",
        "kv_heads",
        "group",
        "num_rows",
        "num_columns",
        "window",
        "sinks",
        "slots",
    ],
    do_not_specialize_on_alignment=["scores_ptr", "rows_ptr", "counts_ptr"],
)
def s2_select_blocks_kernel(
    scores_ptr, rows_ptr, counts_ptr, lists_ptr,
    scores_batch, scores_kv_head, scores_head, scores_row, rows_batch, counts_batch,
    kv_heads, group, num_rows, num_columns, window, sinks, slots,
    COLUMNS: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Write lists [b, h_kv, rows, sinks + slots + window]."""
    program = tl.program_id(0).to(tl.int64)
    r = program % num_rows
    kv_head = program // num_rows % kv_heads
    batch = program // num_rows // kv_heads
    row = tl.load(rows_ptr + batch * rows_batch + r).to(tl.int32)
    count = tl.load(counts_ptr + batch * counts_batch + r)
    column = tl.arange(0, COLUMNS)
    is_candidate = (column >= sinks) & (column <= row - window) & (column < num_columns)

    base = scores_ptr + batch * scores_batch + kv_head * scores_kv_head + r * scores_row
    score = tl.full([COLUMNS], float("-inf"), tl.float32)
    for head in range(0, group):
        x = tl.load(base + head * scores_head.to(tl.int64) + column, mask=is_candidate, other=_MASKED)
        if NORMALIZE:
            x = x - tl.max(x, 0)
            x = x - tl.log(tl.sum(tl.exp(x), 0))
        score = _log_add(score, x)
    score = tl.where(score != score, float("inf"), score)
    score = tl.where(is_candidate, score, _MASKED)

    out = lists_ptr + program * (sinks + slots + window)
    for sink in range(0, sinks):
        tl.store(out + sink, tl.where(sink <= row - window, sink, -1))
    out += sinks
    chosen = tl.minimum(count, slots)
    for slot in range(0, chosen):
        best = tl.max(score, 0)
        at = tl.min(tl.where(score == best, column, COLUMNS), 0)
        tl.store(out + slot, tl.where(best >= _MASKED / 2, at, -1))
        score = tl.where(column == at, float("-inf"), score)
    for slot in range(chosen, slots):
        tl.store(out + slot, -1)
    out += slots
    for last in range(0, window):
        tl.store(out + last, tl.maximum(row - (window - 1 - last), -1))


def num_warps(columns: int) -> int:
    """Return the warps of a program that holds `columns` scores."""
    return max(1, min(_MOST_WARPS, columns // _COLUMNS_OF_WARP))


def triton_select_blocks(
    scores: Tensor, rows: Tensor, counts: Tensor, window: int, sinks: int, slots: int, normalize: bool
) -> Tensor:
    """Compute `select_blocks` of float32 scores [b, h_kv, group, rows, n_k]."""
    if scores.stride(-1) != 1:
        scores = scores.contiguous()
    b, kv_heads, group, num_rows, num_columns = scores.shape
    lists = spec.empty((b, kv_heads, num_rows, sinks + slots + window), torch.int32, scores.device)
    programs = b * kv_heads * num_rows
    check_launch(programs, 1, 1)
    columns = max(16, triton.next_power_of_2(num_columns))
    rows, counts = rows.contiguous(), counts.contiguous()
    rows_batch, counts_batch = (num_rows if len(x) > 1 else 0 for x in (rows, counts))
    with torch.cuda.device_of(scores):
        s2_select_blocks_kernel[(programs,)](
            scores, rows, counts, lists, *scores.stride()[:-1], rows_batch, counts_batch,
            kv_heads, group, num_rows, num_columns, window, sinks, slots,
            COLUMNS=columns, NORMALIZE=normalize, num_warps=num_warps(columns),
        )  # fmt: skip
    return lists
