"""Backward schedule of a call, for every kind of layout."""

from __future__ import annotations

from ..spec import AttentionSpec
from ..topk_layout import Layout, TopKLayout
from .backward_schedule import PLAIN, BackwardSchedule, ScheduleOptions, backward_schedule
from .packed_backward_schedule import packed_backward_schedule
from .topk_backward_schedule import topk_backward_schedule


def schedule_of_call(
    layout: Layout, num_kv_heads: int, s_q: int, s_k: int, spec: AttentionSpec, sequences: int = 1,
    options: ScheduleOptions = PLAIN,
) -> BackwardSchedule:  # fmt: skip
    """Return the main kernel's schedule; `sequences` share each pair.

    `options` hold for static layouts without packed documents.
    """
    if isinstance(layout, TopKLayout):
        sizes = (num_kv_heads, s_q, s_k, spec.query_offset, spec.causal, spec.split_columns)
        return layout.built(("backward_schedule", *sizes), lambda: topk_backward_schedule(layout, *sizes))
    if spec.cu_seqlens is not None:
        return packed_backward_schedule(layout, num_kv_heads, spec.cu_seqlens, s_k)
    copies = sequences if spec.split_columns else 0
    return backward_schedule(layout, num_kv_heads, s_q, s_k, spec.query_offset, spec.causal, copies, options)
