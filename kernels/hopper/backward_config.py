"""Settings of the Hopper backward, and which ones a call gets."""

from __future__ import annotations

from dataclasses import dataclass

from ..spec import AttentionSpec
from ..topk_layout import Layout, TopKLayout
from .backward_schedule import PLAIN, TILE, ScheduleOptions

# Keyed by head dimension and queries of a step. Three stages of dimension 128 take 226 KiB of shared memory in all; of
# 128 queries a third stage is 592 bytes too large.
_STAGES = {(128, TILE): 3, (64, TILE): 4, (64, 2 * TILE): 2}
# Rows of queries of a KV head's members; measured are half (slower by query head) and twice as many (faster). A row of
# q, dO and float32 dq has 1 kB at head dimension 128, so these have 268 MB.
_MOST_ROWS_BY_KV_HEAD = 262_144


@dataclass(frozen=True)
class HopperBackwardConfig:
    """Stages for tiles of queries and output gradients; registers per thread.

    ``schedule`` has choices that only static layouts have, and no packed documents. 128 queries a step take head
    dimension 64 and blocks of at least 128.
    """

    stages: int
    consumer_registers: int = 240
    other_registers: int = 24
    schedule: ScheduleOptions = PLAIN


def config_of(dim: int, schedule: ScheduleOptions = PLAIN) -> HopperBackwardConfig:
    """Return the settings for a head dimension and explicit choices."""
    return HopperBackwardConfig(_STAGES[dim, schedule.query_tile], schedule=schedule)


def chosen_config(
    layout: Layout, dim: int, num_kv_heads: int, s_q: int, spec: AttentionSpec
) -> HopperBackwardConfig:  # fmt: skip
    """Choose the settings of a call that gives none.

    Lists made at run time and packed documents get plain ones. The choices for static layouts are what made the
    backward faster on an H200: kernels/NOTES.md, "candidates". TFLOP/s below are at 32k / 128k tokens, with 32 query
    heads. `tune --candidates` times them again.
    """
    if not _takes_choices(layout, spec):
        return config_of(dim)
    return config_of(
        dim,
        ScheduleOptions(
            # half of the barriers, fewer operands from shared memory, and products under P and dS (`process_halves`):
            # 386 / 423 to 430 / 485 at dimension 64; 128 has no registers for it
            query_tile=2 * TILE if dim == 64 and layout.block_size >= 2 * TILE else TILE,
            # members keep different columns beside the same window: 442 / 496 to 474 / 506 with 8 KV heads; blocks of
            # 128 hold both tiles of a pair
            second_pairs=layout.block_size == TILE and num_kv_heads < layout.num_heads,
            # programs that run together sweep over fewer members' queries: 522 to 541 at 128k with 8 KV heads (506 to
            # 538 beside second pairs); but 498 to 491 at 32k, where the L2 cache holds more of a KV head's queries
            by_query_head=num_kv_heads < layout.num_heads
            and layout.num_heads // num_kv_heads * s_q > _MOST_ROWS_BY_KV_HEAD,
        ),
    )


def check_config(config: HopperBackwardConfig, layout: Layout, dim: int, spec: AttentionSpec) -> None:
    """Raise ValueError if a call does not support explicit settings."""
    schedule = config.schedule
    if schedule != PLAIN and not _takes_choices(layout, spec):
        raise ValueError(f"{schedule} takes a static layout and no packed documents")
    if schedule.query_tile != TILE and (dim != 64 or layout.block_size < schedule.query_tile):
        raise ValueError(f"{config} takes head dimension 64 and blocks of {schedule.query_tile} or more")


def _takes_choices(layout: Layout, spec: AttentionSpec) -> bool:
    return not isinstance(layout, TopKLayout) and spec.cu_seqlens is None
