"""Layouts to compare a choice with, as dense as a budget permits."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from s2train.layouts.counting import kept_share
from s2train.layouts.patterns import LocalVertical, Pattern, SlidingWindow
from s2train.semsa.layouts import Candidates
from s2train.semsa.profile import Profile
from s2train.semsa.solving import Budget, solve

Layers = list[list[Pattern]]
Kind = TypeVar("Kind", bound=Pattern)
_SLACK = 0.03  # random layouts keep at least the budget less this share of it


def uniform_window(profile: Profile, density: float) -> Layers | None:
    """Return the widest window with a sink that meets the budget.

    All heads get it. None if no window meets the budget.
    """
    blocks = -(-profile.seq_length // profile.block_size)
    found = _densest(profile, [SlidingWindow(window, 1) for window in range(1, blocks + 1)], density)
    if found is None:
        return None
    return [[found] * profile.model.num_attention_heads for _ in range(profile.model.num_layers)]


def stripes(profile: Profile, density: float) -> Layers | None:
    """Return the densest S2 layout that meets the budget.

    Its offsets shift from head to head. Of equally dense layouts it takes the one with the widest window. None if none
    meets the budget.
    """
    heads = profile.model.num_attention_heads
    choices = [LocalVertical(local, stride, 0) for local in (1, 2, 4, 8, 16) for stride in (2, 4, 8, 16, 32)]
    found = _densest(profile, [pattern for pattern in choices if pattern.stride <= heads], density)
    if found is None:
        return None
    return [[found.shifted(head) for head in range(heads)] for _ in range(profile.model.num_layers)]


def random_rules(
    profile: Profile, candidates: Candidates, density: float, group: int, rng: np.random.Generator
) -> Layers | None:
    """Draw random rules whose density is about the budget.

    None if the solver finds no rules.
    """
    share = candidates.density(profile.block_size, profile.seq_length)
    budget = Budget(share, density, density * (1 - _SLACK))
    # random costs, the same for all heads of a group, choose a random point among those that meet the budget
    layers, heads, rules = share.shape
    cost = rng.random((layers, heads // group, rules)).repeat(group, 1)
    found = solve(cost, [budget], group=group)
    return None if found is None else candidates.of_heads(found.rules)


def _densest(profile: Profile, patterns: Sequence[Kind], density: float) -> Kind | None:
    size, length = profile.block_size, profile.seq_length
    shares = [(kept_share(pattern, size, length), number) for number, pattern in enumerate(patterns)]
    fitting = [(share, number) for share, number in shares if share <= density]
    return patterns[max(fitting)[1]] if fitting else None


def mean_density(layers: Layers, profile: Profile) -> float:
    """Return the share of causal positions that heads keep on average."""
    size, length = profile.block_size, profile.seq_length
    shares = {pattern: kept_share(pattern, size, length) for row in layers for pattern in row}
    return sum(shares[pattern] for row in layers for pattern in row) / sum(len(row) for row in layers)
