"""The layers of a model: which kind each is, and what its heads keep."""

import re
from dataclasses import dataclass

import torch

from s2train.config import LayoutConfig, ScheduleConfig
from s2train.errors import ConfigError
from s2train.kernels.layout import BLOCK_SIZES, BlockLayout
from s2train.kernels.layout_lines import ColumnRule
from s2train.layouts.kinds import KINDS, AttentionKind, KindContext
from s2train.layouts.patterns import ColumnPattern, Dense, Pattern
from s2train.layouts.schedules import Schedule, find_schedule

_GROUP = re.compile(r"(?P<runs>(?:[A-Z][0-9]*)+)(?:x(?P<repeat>[0-9]+))?")
_RUN = re.compile(r"([A-Z])([0-9]*)")


def parse_layers(text: str, num_layers: int) -> tuple[str, ...]:
    """The letter of every layer, from a string such as DSSS.

    Grammar (nothing in it that a shell would touch)::

        string = group, groups after the first set off by "-"      DD-S3D1x7-DD
        group  = runs, and xN to repeat them all N times           D1S3x8   (DSSS, eight times)
        run    = a letter of KINDS, and a count                    S3       (SSS)

    The letters, if fewer than the layers, are repeated to the model's depth: DSSS is four layers, tiled.

    Raises:
        ConfigError: unreadable, an unknown letter, or a length that doesn't divide `num_layers`.
    """
    groups = [_parse_group(group, text) for group in text.split("-")]
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


def _parse_group(group: str, text: str) -> tuple[list[tuple[str, int]], int]:
    valid = ", ".join(f"{kind.letter} ({kind.name})" for kind in KINDS.values())
    for letter in group:
        if letter.isalpha() and letter != "x" and letter not in KINDS:
            raise ConfigError("layout.layers", text, f"unknown letter {letter}", f"Letters: {valid}.")
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
        rules = [
            ColumnRule(pattern.local, pattern.columns) if isinstance(pattern, ColumnPattern) else pattern.keep
            for pattern in index
        ]
        num_blocks = self.num_blocks(seq_length)
        return BlockLayout.from_rule(
            rules,
            [index[pattern] for pattern in patterns],
            self.block_size,
            num_blocks,
            num_blocks,
            device=device,
        )


@dataclass(frozen=True)
class HybridLayout:
    """All layers of a model, first to last."""

    layers: tuple[LayerLayout, ...]
    block_size: int  # tokens
    num_query_groups: int  # KV heads
    schedule: Schedule  # that gave the sparse layers their offsets


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
    found = find_schedule(schedule.kind)
    layers: list[LayerLayout] = []
    sparse_layers = 0
    for letter in parse_layers(layout.layers, num_layers):
        kind = KINDS[letter]
        context = KindContext(num_heads, num_query_groups, layout.pattern, found, sparse_layers)
        layer = LayerLayout(kind, kind.heads(context), layout.block_size)
        layers.append(layer)
        sparse_layers += not layer.is_dense
    return HybridLayout(tuple(layers), layout.block_size, num_query_groups, found)
