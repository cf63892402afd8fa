"""The layers of a model: which kind each is, and what its heads keep."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch

from s2train.config import LayoutConfig, ScheduleConfig
from s2train.errors import ConfigError
from s2train.kernels.layout import BLOCK_SIZES, BlockLayout
from s2train.kernels.layout_builder import ColumnRule, Rule
from s2train.layouts.kinds import KINDS, AttentionKind, KindContext
from s2train.layouts.patterns import BandedPattern, Dense, HeadPatterns, LayerContext, Pattern
from s2train.layouts.patterns.registry import build_patterns, read_pattern
from s2train.layouts.placement import place_balanced
from s2train.layouts.schedules import Schedule, ScheduleContext, dense_head_numbers, find_schedule

_GROUP = re.compile(r"(?P<runs>(?:[A-Z][0-9]*)+)(?:x(?P<repeat>[0-9]+))?")
_RUN = re.compile(r"([A-Z])([0-9]*)")


def parse_layers(text: str, num_layers: int, kinds: Mapping[str, AttentionKind] = KINDS) -> tuple[str, ...]:
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
            f"Write as many layers as one of: {lengths}.",
        )
    letters = "".join("".join(letter * count for letter, count in runs) * repeat for runs, repeat in groups)
    return tuple(letters * (num_layers // length))


def _parse_group(group: str, text: str, kinds: Mapping[str, AttentionKind]) -> tuple[list[tuple[str, int]], int]:
    valid = ", ".join(f"{letter} ({kind.name})" for letter, kind in kinds.items())
    for letter in group:
        if letter.isalpha() and letter != "x" and letter not in kinds:
            remedy = f"Letters: {valid}; layout.patterns declares further ones."
            raise ConfigError("layout.layers", text, f"unknown letter {letter}", remedy)
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
class LayerLayout:
    """One layer: what each of its query heads keeps."""

    kind: AttentionKind
    heads: tuple[Pattern, ...]  # one per query head
    block_size: int  # tokens

    @property
    def is_dense(self) -> bool:
        return all(isinstance(head, Dense) for head in self.heads)

    def num_blocks(self, seq_length: int) -> int:
        """Blocks of a sequence; the last may be partial."""
        return -(-seq_length // self.block_size)

    def block_layout(
        self, seq_length: int, *, heads: slice | None = None, device: torch.device | str = "cpu"
    ) -> BlockLayout:
        """The kept blocks over `seq_length` tokens, of all query heads or a slice of them, on `device`."""
        patterns = self.heads if heads is None else self.heads[heads]
        index = {pattern: number for number, pattern in enumerate(dict.fromkeys(patterns))}
        num_blocks = self.num_blocks(seq_length)
        return BlockLayout.from_rule(
            [_rule(pattern, num_blocks) for pattern in index],
            [index[pattern] for pattern in patterns],
            self.block_size,
            num_blocks,
            num_blocks,
            device=device,
        )


def _rule(pattern: Pattern, num_blocks: int) -> Rule:
    """What `BlockLayout.from_rule` asks: in closed form where the pattern is a whole window and columns before it."""
    if isinstance(pattern, BandedPattern) and len(pattern.limits) <= 1:
        window = pattern.limits[0] if pattern.limits else 1  # the diagonal is always kept
        if window == 1 or bool(pattern.columns(0, torch.arange(num_blocks)).all()):
            return ColumnRule(window, partial(pattern.columns, len(pattern.limits)))
    return pattern.keep


@dataclass(frozen=True)
class HybridLayout:
    """All layers of a model, first to last."""

    layers: tuple[LayerLayout, ...]
    block_size: int  # tokens
    num_query_groups: int  # KV heads
    schedule: Schedule  # that gave the sparse layers their offsets

    @cached_property
    def heads(self) -> Counter[Pattern]:
        """How many query heads, of all layers, have each pattern."""
        return Counter(head for layer in self.layers for head in layer.heads)


def letters_of(layout: LayoutConfig) -> dict[str, AttentionKind]:
    """The letters that the layout's string may have: those of KINDS, and its own, of sparse layers.

    Raises:
        ConfigError: `layout.patterns` declares no capital letter, or one that KINDS has.
    """
    kinds = dict(KINDS)
    for letter, given in layout.patterns.items():
        setting = f"layout.patterns.{letter}"
        if not re.fullmatch("[A-Z]", letter):
            raise ConfigError(setting, given, "its name is no capital letter", "Name it by one, such as W.")
        if letter in KINDS:
            problem = f"{letter} is the letter of {KINDS[letter].name} attention"
            taken = ", ".join(KINDS)
            raise ConfigError(setting, given, problem, f"Name it by another letter than {taken}.")
        kinds[letter] = replace(KINDS["S"], letter=letter, name=read_pattern(given, setting).kind)
    return kinds


def patterns_of(layout: LayoutConfig) -> dict[str, HeadPatterns]:
    """What the layout's letters keep where their kind asks for a pattern: `layout.pattern`, or their own.

    Raises:
        ConfigError: as `letters_of`, and for patterns that can't be.
    """
    default = build_patterns(layout.pattern, "layout.pattern")
    patterns = {}
    for letter in letters_of(layout):
        setting = pattern_setting(letter)
        given = layout.patterns.get(letter)
        patterns[letter] = default if given is None else build_patterns(read_pattern(given, setting), setting)
    return patterns


def pattern_setting(letter: str) -> str:
    """The setting with the pattern of a layer's letter."""
    return "layout.pattern" if letter in KINDS else f"layout.patterns.{letter}"


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
    kinds, found = letters_of(layout), find_schedule(schedule)
    dense_heads = dense_head_numbers(schedule.dense_heads, num_heads)
    patterns = patterns_of(layout)
    layers: list[LayerLayout] = []
    sparse_layers = 0
    for number, letter in enumerate(parse_layers(layout.layers, num_layers, kinds)):
        context = LayerContext(
            number,
            num_heads,
            num_query_groups,
            layout.block_size,
            partial(_offsets, found, num_heads, num_query_groups, sparse_layers),
            pattern_setting(letter),
        )
        heads = kinds[letter].heads(KindContext(context, patterns[letter], dense_heads))
        if schedule.placement == "balanced":
            heads = place_balanced(heads, num_query_groups)
        # A layer that keeps everything is dense attention, by whatever letter.
        layer = LayerLayout(kinds[letter], heads, layout.block_size)
        layers.append(replace(layer, kind=KINDS["D"]) if layer.is_dense else layer)
        sparse_layers += not layer.is_dense
    if sparse_layers % found.rows:
        raise ConfigError(
            "schedule.offsets",
            f"({found.rows} lists)",
            f"don't divide the model's {sparse_layers} sparse layers",
            f"Write a list for each of {sparse_layers} layers, or for as many as divide them.",
        )
    return HybridLayout(tuple(layers), layout.block_size, num_query_groups, found)


def _offsets(
    schedule: Schedule, num_heads: int, num_query_groups: int, sparse_layer: int, period: int
) -> tuple[int, ...]:
    """Every query head's offset for a pattern of `period`, in the sparse layer of this number."""
    if period == 1:
        return (0,) * num_heads
    return schedule.offsets(ScheduleContext(num_heads, num_query_groups, period, sparse_layer))
