"""Which far blocks no head sees: union coverage of the sparse layers, one by one and over their runs."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from s2train.config import LayoutConfig
from s2train.errors import ConfigError
from s2train.layouts.counting import kept_key_blocks
from s2train.layouts.hybrid import HybridLayout
from s2train.layouts.patterns import Pattern
from s2train.layouts.schedules import SCHEDULES


@dataclass(frozen=True)
class Coverage:
    """Causal (query block, key block) pairs seen by at least one head, of all."""

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
    """Consecutive sparse layers `first` to `last` (counted from 0): each alone, and their union."""

    first: int
    last: int
    layers: tuple[Coverage, ...]
    union: Coverage

    @property
    def numbers(self) -> str:
        """Its layers, for people."""
        return f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True)
class CoverageReport:
    """Coverage of a model's sparse layers at one sequence length."""

    seq_length: int  # tokens
    num_blocks: int
    schedule: str
    per_run: bool  # the schedule promises full coverage for a run's union, not for each layer
    runs: tuple[RunCoverage, ...]

    def complete(self, run: RunCoverage) -> bool:
        """Does the run see every block, in the way that its schedule promises?"""
        return run.union.complete if self.per_run else all(layer.complete for layer in run.layers)

    def format(self) -> str:
        """Lines for a log: one for each sort of run, naming its layers."""
        head = f"coverage at {self.seq_length:,} tokens ({self.num_blocks:,} blocks), schedule {self.schedule}"
        if not self.runs:
            return f"{head}: no sparse layers"
        alike: dict[str, list[str]] = {}
        for run in self.runs:
            alike.setdefault(_describe(run), []).append(run.numbers)
        lines = [f"  layers {', '.join(numbers)}: {text}" for text, numbers in alike.items()]
        return "\n".join([f"{head}:", *lines])


def union_coverage(heads: Sequence[Pattern], num_blocks: int) -> Coverage:
    """What the heads see together, of `num_blocks` query and key blocks."""
    seen = int(kept_key_blocks(heads, num_blocks).sum())
    return Coverage(seen, num_blocks * (num_blocks + 1) // 2)


def coverage_report(hybrid: HybridLayout, seq_length: int) -> CoverageReport:
    """Exact coverage of every sparse layer, and of every run of consecutive sparse layers."""
    num_blocks = hybrid.layers[0].num_blocks(seq_length)
    runs = []
    for is_dense, group in itertools.groupby(enumerate(hybrid.layers), lambda item: item[1].is_dense):
        if is_dense:
            continue
        numbers, layers = zip(*group, strict=True)
        alone = tuple(union_coverage(layer.heads, num_blocks) for layer in layers)
        heads = [head for layer in layers for head in layer.heads]
        runs.append(RunCoverage(numbers[0], numbers[-1], alone, union_coverage(heads, num_blocks)))
    return CoverageReport(seq_length, num_blocks, hybrid.schedule.name, hybrid.schedule.per_run, tuple(runs))


def check_coverage(hybrid: HybridLayout, seq_length: int, layout: LayoutConfig) -> CoverageReport:
    """The coverage report, or an error if some far block is seen by no head.

    Each sparse layer has to see every causal block by itself; under a schedule that promises it per run
    (rotating), its run of consecutive sparse layers has to, together.

    Raises:
        ConfigError: a layer or run misses blocks, and `layout.allow_partial_coverage` is off.
    """
    report = coverage_report(hybrid, seq_length)
    lacking = [run for run in report.runs if not report.complete(run)]
    if lacking and not layout.allow_partial_coverage:
        raise ConfigError(
            "schedule.kind",
            hybrid.schedule.name,
            _problem(hybrid, report, lacking[0], layout),
            _remedy(hybrid, min(len(run.layers) for run in report.runs), layout),
        )
    return report


def _describe(run: RunCoverage) -> str:
    least, most = (percent(pick(layer.fraction for layer in run.layers)) for pick in (min, max))
    alone = least if least == most else f"{least} to {most}"
    if len(run.layers) == 1:
        return f"{alone} of the causal blocks seen"
    if least == most == "100 %":
        return "100 % of the causal blocks seen in each layer"
    return f"{alone} of the causal blocks seen in each layer, {percent(run.union.fraction)} in the run"


def _problem(hybrid: HybridLayout, report: CoverageReport, run: RunCoverage, layout: LayoutConfig) -> str:
    """Where blocks are missing, with examples."""
    if report.per_run:
        plural = "s" if len(run.layers) > 1 else ""
        name, covered, numbers = f"layer{plural} {run.numbers}", run.union, range(run.first, run.last + 1)
    else:
        number = next(number for number, layer in enumerate(run.layers) if not layer.complete)
        covered, number = run.layers[number], run.first + number
        name, numbers = f"layer {number}", range(number, number + 1)
    heads = [head for number in numbers for head in hybrid.layers[number].heads]
    query, missing = _missing(heads, report.num_blocks)
    examples = ", ".join(map(str, missing[:4])) + (", …" if len(missing) > 4 else "")
    return (
        f"with stride {layout.pattern.stride} the heads of {name} see {percent(covered.fraction)} of the "
        f"causal blocks at {report.seq_length:,} tokens: query block {query} misses {len(missing)} of its "
        f"{query + 1} key blocks ({examples})"
    )


def _missing(patterns: Sequence[Pattern], num_blocks: int) -> tuple[int, list[int]]:
    """The last query block with a causal key block that no pattern keeps, and all such key blocks."""
    every = torch.arange(1, num_blocks + 1)
    query = (kept_key_blocks(patterns, num_blocks) < every).nonzero()[-1]
    key = torch.arange(int(query) + 1)
    seen = torch.zeros_like(key, dtype=torch.bool)
    for pattern in dict.fromkeys(patterns):
        seen |= pattern.keep(query, key)
    return int(query), (~seen).nonzero().flatten().tolist()


def _remedy(hybrid: HybridLayout, shortest_run: int, layout: LayoutConfig) -> str:
    num_heads, groups, stride = len(hybrid.layers[0].heads), hybrid.num_query_groups, layout.pattern.stride
    widest = {kind: schedule.widest_stride(num_heads, groups, shortest_run) for kind, schedule in SCHEDULES.items()}
    others = [kind for kind in widest if widest[kind] >= stride]
    ways = []
    if others:
        ways.append(f"schedule.kind={' or '.join(others)}")
    else:
        run = -(-stride // groups)
        ways.append(f"schedule.kind=rotating and layout.layers with {run} or more sparse layers in a row")
    if widest[hybrid.schedule.name] > 1:
        ways.append(f"layout.pattern.stride={widest[hybrid.schedule.name]} or less")
    ways.append("layout.allow_partial_coverage=true to go on all the same")
    return f"Set {', or '.join(ways)}."


def percent(fraction: float) -> str:
    """To a tenth, rounded down: 100 % is all."""
    return f"{int(fraction * 1000) / 10:.1f} %" if fraction < 1 else "100 %"
