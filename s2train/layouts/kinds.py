"""The kinds of attention that a layer can have: one entry of `KINDS` each."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from s2train.config import PatternConfig
from s2train.layouts.patterns import Dense, LocalVertical, Pattern
from s2train.layouts.schedules import Schedule, ScheduleContext


@dataclass(frozen=True)
class KindContext:
    """What the patterns of a layer's heads may depend on."""

    num_heads: int
    num_query_groups: int
    pattern: PatternConfig
    schedule: Schedule
    sparse_layer_index: int  # among the model's sparse layers, from 0


@dataclass(frozen=True)
class AttentionKind:
    """A kind: its letter in `layout.layers`, its heads' patterns, and the class that computes it."""

    name: str
    letter: str  # one of A to Z
    heads: Callable[[KindContext], tuple[Pattern, ...]]  # one per query head
    core_attention: str  # "module:Class", imported by the floor above


def _dense_heads(context: KindContext) -> tuple[Pattern, ...]:
    return (Dense(),) * context.num_heads


def _s2_heads(context: KindContext) -> tuple[Pattern, ...]:
    settings = context.pattern
    pattern = LocalVertical(settings.local, settings.stride, 0, settings.sinks)
    offsets = context.schedule.offsets(
        ScheduleContext(context.num_heads, context.num_query_groups, pattern.stride, context.sparse_layer_index)
    )
    return tuple(replace(pattern, offset=offset) for offset in offsets)


KINDS: dict[str, AttentionKind] = {
    kind.letter: kind
    for kind in (
        AttentionKind("dense", "D", _dense_heads, "s2train.megatron.core_attention:DenseCoreAttention"),
        AttentionKind("s2", "S", _s2_heads, "s2train.megatron.core_attention:SparseCoreAttention"),
    )
}
