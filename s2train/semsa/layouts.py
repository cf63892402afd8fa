"""Turns each head's rule into densities and into a run's layout."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]

from s2train.attention.coverage import coverage_report
from s2train.attention.hybrid import HybridLayout, build_hybrid_layout
from s2train.config import LayoutConfig, PatternConfig, ScheduleConfig
from s2train.files import replacing
from s2train.layouts.counting import kept_share
from s2train.layouts.patterns import Dense, GlobalBlocks, LocalVertical, Pattern, SlidingWindow, Span
from s2train.semsa.profile import Profile
from s2train.semsa.rules import pattern_of

Settings = dict[str, Any]
_KINDS: dict[type[Pattern], str] = {
    Dense: "dense",
    GlobalBlocks: "global_blocks",
    LocalVertical: "local_vertical",
    SlidingWindow: "sliding_window",
    Span: "span",
}


@dataclass(frozen=True)
class Candidates:
    """The patterns that a profile's rules give each head.

    Attributes:
        distinct: settings of different patterns.
        index: int64 [layers, heads, rules], numbers in `distinct`.
        patterns: of `distinct`.
    """

    distinct: tuple[Settings, ...]
    index: np.ndarray
    patterns: tuple[Pattern, ...]

    @classmethod
    def of(cls, profile: Profile) -> "Candidates":
        """Make the candidates of a profile."""
        numbers: dict[str, int] = {}
        distinct: list[Settings] = []
        layers, heads, rules = profile.rules.shape[1:4]
        index = np.zeros((layers, heads, rules), dtype=np.int64)
        for place in np.ndindex(layers, heads, rules):
            layer, head, rule = place
            settings = profile.settings_of(rule, layer, head)
            key = str(settings)
            if key not in numbers:
                numbers[key] = len(distinct)
                distinct.append(settings)
            index[place] = numbers[key]
        return cls(tuple(distinct), index, tuple(pattern_of(own, profile.block_size) for own in distinct))

    def density(self, block_size: int, seq_length: int) -> np.ndarray:
        """Return the share of causal positions that each rule keeps.

        The result is float64 [layers, heads, rules].
        """
        shares = np.array([kept_share(pattern, block_size, seq_length) for pattern in self.patterns])
        density: np.ndarray = shares[self.index]
        return density

    def kv_efficient(self) -> list[int]:
        """Return the numbers of rules that are KV efficient in every head.

        Such a rule never reads a dropped key again.
        """
        efficient = np.array([pattern.kv_efficient for pattern in self.patterns])
        return [int(rule) for rule in np.flatnonzero(efficient[self.index].all((0, 1)))]

    def heads(self, rules: np.ndarray) -> list[list[int]]:
        """Return each head's number in `distinct`, by layer.

        `rules` are the chosen ones, [layers, heads].
        """
        return [
            [int(self.index[layer, head, rule]) for head, rule in enumerate(row)] for layer, row in enumerate(rules)
        ]

    def of_heads(self, rules: np.ndarray) -> list[list[Pattern]]:
        """Return each head's pattern, by layer."""
        return [[self.patterns[number] for number in row] for row in self.heads(rules)]


def layout_settings(candidates: Candidates, rules: np.ndarray, block_size: int) -> LayoutConfig:
    """Make a run's layout of chosen rules [layers, heads].

    It has only the patterns in use.
    """
    numbers = candidates.heads(rules)
    used = sorted({number for row in numbers for number in row})
    place = {number: new for new, number in enumerate(used)}
    own = [candidates.distinct[number] for number in used]
    pattern = PatternConfig("per_head", rules=own, heads=[[place[number] for number in row] for row in numbers])
    return LayoutConfig("S", block_size, pattern)


def settings_of(pattern: Pattern) -> Settings:
    """Return the settings of a rule's or a baseline's pattern."""
    values = asdict(pattern)  # type: ignore[call-overload]  # patterns are dataclasses
    if "blocks" in values:
        values["globals"] = list(values.pop("blocks"))
    return {"kind": _KINDS[type(pattern)], **values}


def named_heads(layers: Sequence[Sequence[Pattern]]) -> PatternConfig:
    """Name each head's pattern.

    Rules are numbered as heads first need them, equal ones once.
    """
    numbers: dict[Pattern, int] = {}
    heads = [[numbers.setdefault(pattern, len(numbers)) for pattern in row] for row in layers]
    return PatternConfig("per_head", rules=[settings_of(pattern) for pattern in numbers], heads=heads)


def layout_of(layers: Sequence[Sequence[Pattern]], profile: Profile) -> LayoutConfig:
    """Make a run's layout of each head's pattern."""
    if all(isinstance(pattern, Dense) for row in layers for pattern in row):
        return LayoutConfig("D", profile.block_size)
    layout = LayoutConfig("S", profile.block_size, named_heads(layers))
    complete = sees_everything(build_layout(layout, profile), [profile.seq_length])
    return layout if complete else replace(layout, allow_partial_coverage=True)


def build_layout(layout: LayoutConfig, profile: Profile) -> HybridLayout:
    """Build the layout for the profiled model."""
    model = profile.model
    return build_hybrid_layout(
        layout, ScheduleConfig(), num_layers=model.num_layers, num_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
    )  # fmt: skip


def sees_everything(hybrid: HybridLayout, lengths: Sequence[int]) -> bool:
    """Return whether some head sees each far block.

    Runs require this by default.
    """
    return all(run.complete for length in lengths for run in coverage_report(hybrid, length).runs)


def write_layout(path: Path, layout: LayoutConfig, comment: Sequence[str]) -> None:
    """Write the layout as a file of conf/layout."""
    flow: list[str] = [f"# {line}" for line in comment]
    flow += [f"layers: {layout.layers}", f"block_size: {layout.block_size}"]
    if layout.allow_partial_coverage:
        flow.append("allow_partial_coverage: true")
    if layout.pattern.kind == "per_head":
        flow += ["pattern:", "  kind: per_head", "  rules:"]
        flow += [f"  - {_flow(settings)}" for settings in layout.pattern.rules]
        flow += ["  heads:  # by layer: the number in `rules` of each head, counted from 0"]
        flow += [f"  - {_flow(row)}" for row in layout.pattern.heads]
    with replacing(path) as temporary:
        temporary.write_text("\n".join(flow) + "\n", encoding="utf-8")


def _flow(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)).strip()
