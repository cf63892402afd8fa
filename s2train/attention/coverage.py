"""Finds the far blocks that no head sees.

It counts the union coverage of each sparse layer and of each run of sparse layers.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch

from s2train.attention.hybrid import HybridLayout
from s2train.attention.kind import LayerLayout
from s2train.config import LayoutConfig
from s2train.errors import ConfigError
from s2train.layouts.counting import kept_key_blocks
from s2train.layouts.patterns import Dense, Pattern
from s2train.layouts.schedules import SCHEDULES


@dataclass(frozen=True)
class Coverage:
    """Share of causal block pairs that at least one head sees.

    Attributes:
        seen: (query block, key block) pairs that at least one head sees.
        causal: all causal pairs.
    """

    seen: int
    causal: int

    @property
    def fraction(self) -> float:
        return self.seen / self.causal

    @property
    def complete(self) -> bool:
        return self.seen == self.causal


@dataclass(frozen=True)
class RunCoverage:
    """Coverage of consecutive sparse layers: each alone, and their union.

    Attributes:
        first, last: numbers of the first and last layer, counted from 0.
    """

    first: int
    last: int
    layers: tuple[Coverage, ...]
    union: Coverage
    alone: tuple[bool, ...]  # which layers have to see every block by themselves, and not with their run
    dense_heads: tuple[int, ...]  # how many heads of each layer are dense

    @property
    def complete(self) -> bool:
        """Does it see every block, in the way that its schedule promises?"""
        return self.union.complete and all(
            layer.complete for layer, alone in zip(self.layers, self.alone, strict=True) if alone
        )

    @property
    def numbers(self) -> str:
        """Its layers, for people."""
        return _range(self.first, self.last)


@dataclass(frozen=True)
class CoverageReport:
    """Coverage of a model's sparse layers at one sequence length."""

    seq_length: int  # tokens
    num_blocks: int
    schedule: str
    runs: tuple[RunCoverage, ...]
    undefined: tuple[str, ...] = ()  # a line for each kind whose reads the data choose: which layers, and its name

    def format(self) -> str:
        """Format the report for a log.

        Runs with the same coverage share a line, which names their layers.
        """
        head = f"coverage at {self.seq_length:,} tokens ({self.num_blocks:,} blocks), schedule {self.schedule}"
        if not self.runs and not self.undefined:
            return f"{head}: no sparse layers"
        alike: dict[str, list[str]] = {}
        for run in self.runs:
            alike.setdefault(_describe(run), []).append(run.numbers)
        lines = [f"  layers {', '.join(numbers)}: {text}" for text, numbers in alike.items()]
        return "\n".join([f"{head}:", *lines, *(f"  {line}" for line in self.undefined)])


def union_coverage(heads: Sequence[Pattern], num_blocks: int) -> Coverage:
    """What the heads see together, of `num_blocks` query and key blocks."""
    seen = int(kept_key_blocks(heads, num_blocks).sum())
    return Coverage(seen, num_blocks * (num_blocks + 1) // 2)


def coverage_report(hybrid: HybridLayout, seq_length: int) -> CoverageReport:
    """Compute the exact coverage of every sparse layer and every run.

    A run consists of consecutive sparse layers.
    """
    num_blocks = hybrid.layers[0].num_blocks(seq_length)
    counted: dict[frozenset[Pattern], Coverage] = {}

    def union(heads: Iterable[Pattern]) -> Coverage:
        distinct = frozenset(heads)
        if distinct not in counted:
            counted[distinct] = union_coverage(list(distinct), num_blocks)
        return counted[distinct]

    could_all = cache(partial(_could_see_all, num_blocks=num_blocks))

    def could_see_all(layer: LayerLayout) -> bool:
        return could_all(_scheduled_head(layer).shifted(0))

    runs = []
    for is_covered, group in itertools.groupby(enumerate(hybrid.layers), lambda item: _has_coverage(item[1])):
        if not is_covered:
            continue
        numbers, layers = zip(*group, strict=True)
        layers_alone = tuple(union(layer.heads) for layer in layers)
        runs.append(
            RunCoverage(
                numbers[0],
                numbers[-1],
                layers_alone,
                union(head for layer in layers for head in layer.heads),
                tuple(not hybrid.schedule.per_run and could_see_all(layer) for layer in layers),
                tuple(sum(isinstance(head, Dense) for head in layer.heads) for layer in layers),
            )
        )
    return CoverageReport(seq_length, num_blocks, hybrid.schedule.name, tuple(runs), _undefined(hybrid))


def _has_coverage(layer: LayerLayout) -> bool:
    """Return whether the layer's patterns are fixed and not all dense.

    In such a layer, the blocks that no head sees can be counted.
    """
    return layer.is_static and not layer.is_dense


def _undefined(hybrid: HybridLayout) -> tuple[str, ...]:
    numbers: dict[str, list[int]] = {}
    for number, layer in enumerate(hybrid.layers):
        if not layer.is_static:
            numbers.setdefault(layer.kind.label, []).append(number)
    return tuple(
        f"layers {_ranges(of_kind)}: not defined, {name} attention reads what the data choose"
        for name, of_kind in numbers.items()
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Format the ascending 1, 2, 3, 5 as 1-3, 5."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(map(_range, starts, ends))


def _range(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}-{last}"


def _could_see_all(head: Pattern, num_blocks: int) -> bool:
    """Return whether a pattern's shifts together see every causal block."""
    return union_coverage(shifts(head, num_blocks), num_blocks).complete


def shifts(head: Pattern, num_blocks: int) -> list[Pattern]:
    """List the shifted patterns that a schedule could give a layer's heads.

    If these patterns together see everything, the layer should too. Offsets of `num_blocks` or more are left out: an
    offset is a key block or a distance, so smaller ones see all that they see.
    """
    return [head.shifted(offset) for offset in range(min(head.period, num_blocks))]


def _scheduled_head(layer: LayerLayout) -> Pattern:
    return next(head for head in layer.heads if not isinstance(head, Dense))


def check_coverage(hybrid: HybridLayout, seq_length: int, layout: LayoutConfig) -> CoverageReport:
    """Return the coverage report; reject far blocks that no head sees.

    Each sparse layer has to see every causal block by itself; under a schedule that promises it per run (rotating),
    its run of consecutive sparse layers has to, together. So does the run of a layer that no schedule could make
    see everything (a sliding window).

    Raises:
        ConfigError: a layer or run misses blocks, and `layout.allow_partial_coverage` is off.
    """
    report = coverage_report(hybrid, seq_length)
    lacking = [run for run in report.runs if not run.complete]
    if lacking and not layout.allow_partial_coverage:
        numbers = _lacking_layers(lacking[0])
        raise ConfigError(
            "schedule.kind",
            hybrid.schedule.name,
            _problem(hybrid, report, lacking[0], numbers),
            _remedy(hybrid, report, numbers),
        )
    return report


def _lacking_layers(run: RunCoverage) -> range:
    """Return the layers that miss blocks: one layer, or the whole run.

    It is the first layer that should see every block by itself and doesn't; if there is none, the whole run.
    """
    for number, (layer, alone) in enumerate(zip(run.layers, run.alone, strict=True), run.first):
        if alone and not layer.complete:
            return range(number, number + 1)
    return range(run.first, run.last + 1)


def _describe(run: RunCoverage) -> str:
    least, most = (percent(pick(layer.fraction for layer in run.layers)) for pick in (min, max))
    alone = least if least == most else f"{least} to {most}"
    dense = min(run.dense_heads)
    by = f", by {dense} dense head{'s' if dense > 1 else ''}" if dense else ""
    if len(run.layers) == 1:
        return f"{alone} of the causal blocks seen{by}"
    if least == most == "100 %":
        return f"100 % of the causal blocks seen in each layer{by}"
    return f"{alone} of the causal blocks seen in each layer, {percent(run.union.fraction)} in the run"


def _problem(hybrid: HybridLayout, report: CoverageReport, run: RunCoverage, numbers: range) -> str:
    """Where blocks are missing, with examples."""
    layers = [hybrid.layers[number] for number in numbers]
    covered = run.layers[numbers.start - run.first] if len(numbers) == 1 else run.union
    name = f"layer {numbers.start}" if len(numbers) == 1 else f"layers {numbers.start}-{numbers.stop - 1}"
    forms = "; ".join(dict.fromkeys(_scheduled_head(layer).form() for layer in layers))
    query, missing = _missing([head for layer in layers for head in layer.heads], report.num_blocks)
    examples = ", ".join(map(str, missing[:4])) + (", …" if len(missing) > 4 else "")
    return (
        f"the heads of {name} ({forms}) see {percent(covered.fraction)} of the "
        f"causal blocks at {report.seq_length:,} tokens: query block {query} misses {len(missing)} of its "
        f"{query + 1} key blocks ({examples})"
    )


def _missing(patterns: Sequence[Pattern], num_blocks: int) -> tuple[int, list[int]]:
    """Find the last query block with missing key blocks, and these blocks.

    A missing key block is causal, but no pattern keeps it.
    """
    every = torch.arange(1, num_blocks + 1)
    query = (kept_key_blocks(patterns, num_blocks) < every).nonzero()[-1]
    key = torch.arange(int(query) + 1)
    seen = torch.zeros_like(key, dtype=torch.bool)
    for pattern in dict.fromkeys(patterns):
        seen |= pattern.keep(query, key)
    return int(query), (~seen).nonzero().flatten().tolist()


def _remedy(hybrid: HybridLayout, report: CoverageReport, numbers: range) -> str:
    """What would make the layers see everything."""
    layer = max((hybrid.layers[number] for number in numbers), key=lambda layer: _scheduled_head(layer).period)
    head, kind = _scheduled_head(layer), layer.kind
    setting = kind.pattern_setting
    num_heads, groups = len(layer.heads), hybrid.num_query_groups
    shortest_run = min(len(run.layers) for run in report.runs)
    widest = {kind: schedule.widest_stride(num_heads, groups, shortest_run) for kind, schedule in SCHEDULES.items()}
    remedies = []
    if _could_see_all(head, report.num_blocks):
        if others := [kind for kind in widest if widest[kind] >= head.period]:
            remedies.append(f"schedule.kind={' or '.join(others)}")
        else:
            run = -(-head.period // groups)
            remedies.append(f"schedule.kind=rotating and layout.layers with {run} or more sparse layers in a row")
        if (narrower := widest.get(hybrid.schedule.name, num_heads)) > 1:
            remedies.append(f"{setting}.{head.narrower(narrower)}")
    else:
        remedies.append(f"{setting}.kind=local_vertical, or another that the schedule can spread")
    remedies.append("schedule.dense_heads=1")
    remedies.append("layout.allow_partial_coverage=true to train without full coverage")
    return f"Set {', or '.join(remedies)}."


def percent(fraction: float) -> str:
    """To a tenth, rounded down: 100 % is all."""
    return f"{int(fraction * 1000) / 10:.1f} %" if fraction < 1 else "100 %"
