"""The kinds of attention that a layer can have: one entry of `KINDS` each."""

from collections.abc import Callable
from dataclasses import dataclass

from s2train.layouts.patterns import Dense, HeadPatterns, LayerContext, Pattern


@dataclass(frozen=True)
class KindContext:
    """What a kind makes a layer's heads of."""

    layer: LayerContext
    patterns: HeadPatterns  # of `layout.pattern`, or of the layer's letter in `layout.patterns`
    dense_heads: frozenset[int] = frozenset()  # query heads that the schedule wants dense


@dataclass(frozen=True)
class AttentionKind:
    """A kind: its letter in `layout.layers`, its heads' patterns, and the class that computes it."""

    name: str
    letter: str  # one of A to Z
    heads: Callable[[KindContext], tuple[Pattern, ...]]  # one per query head
    core_attention: str  # "module:Class", imported by the floor above


def _dense_heads(context: KindContext) -> tuple[Pattern, ...]:
    return (Dense(),) * context.layer.num_heads


def _s2_heads(context: KindContext) -> tuple[Pattern, ...]:
    patterns = context.patterns(context.layer)
    return tuple(Dense() if head in context.dense_heads else pattern for head, pattern in enumerate(patterns))


KINDS: dict[str, AttentionKind] = {
    kind.letter: kind
    for kind in (
        AttentionKind("dense", "D", _dense_heads, "s2train.megatron.core_attention:DenseCoreAttention"),
        AttentionKind("s2", "S", _s2_heads, "s2train.megatron.core_attention:SparseCoreAttention"),
    )
}
