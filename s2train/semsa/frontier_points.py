"""Finds the layouts that a frontier measures: chosen ones and others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from s2train.kernels.block_statistics.effects import SUMS
from s2train.layouts.patterns import Dense
from s2train.semsa.baselines import Layers, random_rules, stripes, uniform_window
from s2train.semsa.config import FrontierConfig
from s2train.semsa.layouts import Candidates
from s2train.semsa.profile import Profile, group_size
from s2train.semsa.solving import Budget, solve

DENSE = "dense"
NAMES = {
    "squared": "SemSA, squared effect",
    "absolute": "absolute effect",
    "signed": "signed effect",
    "mass": "magnitude (dropped probability)",
    "random": "random rules",
    "window": "uniform window and a sink",
    "stripes": "S2 stripes",
}
# Those whose training is continued by default, and which pictures of several models show.
TRAINED = ("squared", "mass", "random", "window", "stripes")


@dataclass(frozen=True)
class Point:
    """A layout at a density.

    Attributes:
        layout: a name of `NAMES`, or `DENSE`.
        budget: largest density.
        draw: number of a random layout.
    """

    layout: str
    budget: float
    draw: int = 0

    @property
    def name(self) -> str:
        """Name of its files, such as squared-0.25 and random-0.25-2."""
        if self.layout == DENSE:
            return DENSE
        return f"{self.layout}-{self.budget:g}" + (f"-{self.draw}" if self.layout == "random" else "")

    def describe(self) -> str:
        """Describe it in a few words."""
        return DENSE if self.layout == DENSE else f"density {self.budget:g}, {NAMES[self.layout]}"


def every_point(cfg: FrontierConfig) -> list[Point]:
    """Return the points of these settings, dense first."""
    points = [Point(DENSE, 1.0)]
    for density in sorted(set(cfg.densities)):
        for name in NAMES:
            points += [Point(name, density, draw) for draw in range(cfg.draws if name == "random" else 1)]
    return points


def without_layout(asked: Sequence[Point], found: Sequence[Point]) -> list[str]:
    """Name the points that no layout meets, one line for each density."""
    lines = []
    for density in sorted({point.budget for point in asked}):
        lacking = [point for point in asked if point.budget == density and point not in found]
        names = [NAMES[name] for name in dict.fromkeys(point.layout for point in lacking)]
        if names:
            kinds = "" if len(names) == len(NAMES) else f" for {', '.join(names)}"
            lines.append(f"density {density:g} is not measured{kinds}: no such layout meets it")
    return lines


def find_layers(points: Sequence[Point], cfg: FrontierConfig, profile: Profile) -> Iterator[tuple[Point, Layers]]:
    """Yield each point that meets its density, with every head's pattern."""
    model, candidates = profile.model, Candidates.of(profile)
    group = group_size(model) if cfg.whole_groups else 1
    share = candidates.density(profile.block_size, profile.seq_length)
    for point in points:
        layers: Layers | None
        if point.layout == DENSE:
            layers = [[Dense()] * model.num_attention_heads] * model.num_layers
        elif point.layout in SUMS:
            found = solve(profile.costs(point.layout), [Budget(share, point.budget)], group=group)
            layers = None if found is None else candidates.of_heads(found.rules)
        elif point.layout == "window":
            layers = uniform_window(profile, point.budget)
        elif point.layout == "stripes":
            layers = stripes(profile, point.budget)
        else:
            rng = np.random.default_rng([cfg.seed, point.draw, round(point.budget * 1e6)])
            layers = random_rules(profile, candidates, point.budget, group, rng)
        if layers is not None:
            yield point, layers
