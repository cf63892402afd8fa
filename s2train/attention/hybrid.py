"""The layers of a model, with their kinds and their heads' patterns."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from s2train.attention.kind import AttentionKind, KindContext, LayerLayout
from s2train.attention.registry import LETTERS, OF_PATTERNS_ALONE, kinds_of
from s2train.config import LayoutConfig, ScheduleConfig
from s2train.errors import ConfigError
from s2train.kernels.layout import BLOCK_SIZES
from s2train.layouts.patterns import Dense, LayerContext, Pattern
from s2train.layouts.placement import place_balanced
from s2train.layouts.schedules import Schedule, dense_head_numbers, find_schedule

_GROUP = re.compile(r"(?P<runs>(?:[A-Z][0-9]*)+)(?:x(?P<repeat>[0-9]+))?")
_RUN = re.compile(r"([A-Z])([0-9]*)")


def parse_layers(text: str, num_layers: int, kinds: Mapping[str, AttentionKind] = LETTERS) -> tuple[str, ...]:
    """The letter of every layer, from a string such as DSSS.

    Grammar (nothing in it that a shell would touch)::

        string = group, groups after the first set off by "-"      DD-S3D1x7-DD
        group  = runs, and xN to repeat them all N times           D1S3x8   (DSSS, eight times)
        run    = a letter of `kinds`, and a count                  S3       (SSS)

    The letters, if fewer than the layers, are repeated to the model's depth: DSSS is four layers, tiled.

    Raises:
        ConfigError: unreadable, an unknown letter, or a length that doesn't divide `num_layers`.
    """
    groups = [_parse_group(group, text, kinds) for group in text.split("-")]
    length = sum(repeat * sum(count for _, count in runs) for runs, repeat in groups)
    if num_layers % length:
        lengths = ", ".join(str(n) for n in range(1, num_layers + 1) if num_layers % n == 0)
        raise ConfigError(
            "layout.layers",
            text,
            f"stands for {length} layers, which doesn't divide the model's {num_layers}",
            f"Write one of these numbers of layers: {lengths}.",
        )
    letters = "".join("".join(letter * count for letter, count in runs) * repeat for runs, repeat in groups)
    return tuple(letters * (num_layers // length))


def _parse_group(group: str, text: str, kinds: Mapping[str, AttentionKind]) -> tuple[list[tuple[str, int]], int]:
    valid = ", ".join(f"{letter} ({kind.label})" for letter, kind in kinds.items())
    for letter in group:
        if letter.isalpha() and letter != "x" and letter not in kinds:
            remedy = f"Declare {letter} in layout.patterns or layout.kinds, or name a layout that does."
            if letter.upper() in kinds:
                remedy = f"Write {letter.upper()}."
            raise ConfigError("layout.layers", text, f"unknown letter {letter}", f"Letters: {valid}. {remedy}")
    match = _GROUP.fullmatch(group)
    if not match:
        raise ConfigError(
            "layout.layers",
            text,
            f"can't read {group!r}" if group else "a group is empty",
            f"Write letters with counts, such as DSSS, D1S3x8 or DD-S3D1x7-DD. Letters: {valid}.",
        )
    runs = [(letter, int(count or 1)) for letter, count in _RUN.findall(match["runs"])]
    repeat = int(match["repeat"] or 1)
    if repeat == 0 or any(count == 0 for _, count in runs):
        raise ConfigError("layout.layers", text, f"a count of 0 in {group!r}", "Count from 1.")
    return runs, repeat


@dataclass(frozen=True)
class HybridLayout:
    """All layers of a model, first to last."""

    layers: tuple[LayerLayout, ...]
    block_size: int  # tokens
    num_query_groups: int  # KV heads
    schedule: Schedule  # that gave the sparse layers their offsets

    @cached_property
    def heads(self) -> Counter[Pattern]:
        """How many query heads of all layers have each pattern.

        Raises:
            TypeError: the data choose what a head reads.
        """
        return Counter(head for layer in self.layers for head in layer.heads)

    @cached_property
    def bounds(self) -> Counter[Pattern]:
        """How many query heads of all layers have each pattern or bound.

        It is a bound where the data choose what a head reads; elsewhere the head reads exactly its pattern.
        """
        return Counter(head for layer in self.layers for head in layer.bound)

    @property
    def letters(self) -> str:
        """One a layer."""
        return "".join(layer.kind.letter for layer in self.layers)

    @property
    def is_static(self) -> bool:
        """Whether no layer's reads depend on the data."""
        return all(layer.is_static for layer in self.layers)


def dense_layer(num_heads: int, block_size: int) -> LayerLayout:
    """Make the layout of a layer that keeps every block."""
    return LayerLayout(LETTERS["D"], (Dense(),) * num_heads, block_size)


def build_hybrid_layout(
    layout: LayoutConfig, schedule: ScheduleConfig, *, num_layers: int, num_heads: int, num_query_groups: int
) -> HybridLayout:
    """The layout of a model.

    Raises:
        ConfigError: the layer string, block size, pattern, schedule's kind or number of heads can't work.
    """
    if layout.block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise ConfigError("layout.block_size", layout.block_size, "not supported", f"Set it to one of {sizes}.")
    if num_query_groups < 1 or num_heads % num_query_groups:
        raise ConfigError(
            "model.num_query_groups",
            num_query_groups,
            f"doesn't divide the {num_heads} query heads",
            "Set it to a divisor of model.num_attention_heads.",
        )
    kinds, found = kinds_of(layout), find_schedule(schedule)
    dense_heads = dense_head_numbers(schedule.dense_heads, num_heads)
    heads_of = {letter: kind.heads() for letter, kind in kinds.items()}
    layers: list[LayerLayout] = []
    sparse_layers = 0  # static ones, which the schedule counts
    for number, letter in enumerate(parse_layers(layout.layers, num_layers, kinds)):
        kind = kinds[letter]
        context = LayerContext(
            number,
            num_heads,
            num_query_groups,
            layout.block_size,
            found.of_layer(num_heads, num_query_groups, sparse_layers),
            kind.pattern_setting,
            num_layers,
        )
        heads = heads_of[letter](KindContext(context, dense_heads))
        layer = LayerLayout(kind, heads, layout.block_size)
        if layer.is_static and schedule.placement == "balanced":
            if kind.names_heads:
                problem = f"would reorder the heads whose patterns {kind.pattern_setting} names"
                raise ConfigError("schedule.placement", "balanced", problem, "Set schedule.placement=as_is.")
            layer = replace(layer, bound=place_balanced(heads, num_query_groups))
        # A layer that keeps everything is dense attention, by whatever letter, unless its kind computes otherwise.
        is_plain = layer.is_dense and kind.core_attention in OF_PATTERNS_ALONE
        layers.append(replace(layer, kind=LETTERS["D"]) if is_plain else layer)
        sparse_layers += layer.is_static and not layer.is_dense
    if sparse_layers % found.rows:
        raise ConfigError(
            "schedule.offsets",
            f"({found.rows} lists)",
            f"don't divide the model's {sparse_layers} sparse layers",
            f"Write {sparse_layers} lists, one per sparse layer, or a number of lists that divides {sparse_layers}.",
        )
    return HybridLayout(tuple(layers), layout.block_size, num_query_groups, found)
