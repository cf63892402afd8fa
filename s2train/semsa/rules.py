"""The rules that a head may get.

A rule is a pattern's settings; some rules leave open what depends on the head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from s2train.errors import ConfigError
from s2train.layouts.patterns import LayerContext, Pattern
from s2train.layouts.patterns.registry import build_rule
from s2train.semsa.config import LibraryConfig

MOST_RULES = 64  # that the kernel takes at once
_BY_GROUP = "group"  # offset: the number of the KV group modulo the stride
_TOP = "top"  # globals: as many of the KV group's columns, those that matter most first


@dataclass(frozen=True)
class Rule:
    """A candidate for every head.

    Attributes:
        settings: of its pattern, as in `layout.pattern`; a stripe's offset is "group", and chosen columns are
            {"top": count}.
    """

    settings: Mapping[str, Any]

    def of_group(self, group: int, columns: Sequence[int] = ()) -> dict[str, Any]:
        """Return the settings of a pattern for a KV group's heads.

        These heads share their loads.

        Args:
            group: KV head within its layer.
            columns: its key blocks, those that matter most first.
        """
        own = dict(self.settings)
        if own.get("offset") == _BY_GROUP:
            own["offset"] = group % own["stride"]
        if isinstance(own.get("globals"), Mapping):
            chosen = list(columns[: own["globals"][_TOP]])
            own["globals"] = sorted({*range(own.pop("sinks", 0)), *map(int, chosen)})
        return own

    @property
    def takes_columns(self) -> bool:
        return isinstance(self.settings.get("globals"), Mapping)

    def describe(self) -> str:
        """Describe it in a few words."""
        if self.takes_columns:
            return f"local {self.settings['local']}, {self.settings['globals'][_TOP]} chosen columns"
        return pattern_of(self.of_group(0)).form()


def pattern_of(settings: Mapping[str, Any], block_size: int = 64) -> Pattern:
    """Build one head's pattern.

    Raises:
        ConfigError: the settings make none.
    """
    context = LayerContext(0, 1, 1, block_size, lambda period: (0,), "library")
    return build_rule(dict(settings), "library")(context)[0]


def keeps(settings: Mapping[str, Any], num_blocks: int) -> torch.Tensor:
    """Return which blocks one head's pattern keeps: bool [num_blocks, num_blocks]."""
    blocks = torch.arange(num_blocks)
    return pattern_of(settings).keep(blocks[:, None], blocks)


def is_number(value: object) -> bool:
    """Return whether a value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def make_library(library: LibraryConfig) -> tuple[Rule, ...]:
    """Return the rules of these settings, without duplicates.

    Raises:
        ConfigError: none, too many, or one that can't be.
    """
    for name, example in (("spans", "[[4,0],[2,0.25]]"), ("stripes", "[[4,16]]"), ("columns", "[[4,8]]")):
        given = getattr(library, name)
        pairs = isinstance(given, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in given)
        if not pairs or not all(is_number(value) for pair in given for value in pair):
            raise ConfigError(f"library.{name}", given, "no list of pairs", f"Write pairs, such as {example}.")
    found: list[dict[str, Any]] = []
    for base, slope in library.spans:
        if base != int(base):
            raise ConfigError("library.spans", base, "a base that is no whole block", "Write [base, slope].")
        found.append({"kind": "span", "base": int(base), "slope": float(slope), "sinks": library.sinks})
    for local, stride in library.stripes:
        own = {"local": local, "stride": stride, "offset": _BY_GROUP, "sinks": library.sinks}
        found.append({"kind": "local_vertical"} | own)
    for local, count in library.columns:
        if count < 1:
            raise ConfigError("library.columns", count, "no columns to choose", "Write [local, count].")
        if count != int(count):
            raise ConfigError("library.columns", count, "a count that is no whole number", "Write [local, count].")
        own = {"local": local, "globals": {_TOP: int(count)}, "sinks": library.sinks}
        found.append({"kind": "global_blocks"} | own)
    if library.dense:
        found.append({"kind": "dense"})
    distinct = [settings for number, settings in enumerate(found) if settings not in found[:number]]
    if not 1 <= len(distinct) <= MOST_RULES:
        problem = f"{len(distinct)} rules"
        raise ConfigError("library", "(these rules)", problem, f"Name 1 to {MOST_RULES} different ones.")
    rules = tuple(Rule(settings) for settings in distinct)
    for rule in rules:
        pattern_of(rule.of_group(0))  # rejects what can't be
    return rules


def rule_masks(
    rules: Sequence[Rule], heads: range, group_size: int, columns: np.ndarray | None, num_blocks: int
) -> torch.Tensor:
    """Return what each head would keep under each rule.

    The result is bool [heads, rules, n, n].

    Args:
        heads: within their layer.
        group_size: query heads of a KV head.
        columns: int [all heads, n], key blocks of each head's KV group by importance; None without such rules.
    """
    cache: dict[str, torch.Tensor] = {}

    def mask(rule: Rule, head: int) -> torch.Tensor:
        settings = rule.of_group(head // group_size, () if columns is None else columns[head])
        return cache.setdefault(str(settings), keeps(settings, num_blocks))

    return torch.stack([torch.stack([mask(rule, head) for rule in rules]) for head in heads])
