"""Draw stateless random numbers, and hash queries and keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# constants of splitmix64, as signed numbers
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_UNIT = 2.0**-53


def random_bits(seeds: Tensor, counters: Tensor) -> Tensor:
    """Return 64 random bits (int64) for each seed and counter.

    Both are int64 and broadcast. Equal arguments give equal bits on every device.
    """
    return _mix(_mix(seeds + _STEP) + (counters + 1) * _STEP)


def uniform(seeds: Tensor, counters: Tensor) -> Tensor:
    """Return float64 random numbers of [0, 1) for each seed and counter."""
    return _shifted(random_bits(seeds, counters), 11).double() * _UNIT


def projections(seeds: Tensor, dim: int, number: int) -> Tensor:
    """Draw Gaussian directions, float64 [heads, dim, number], from int64 seeds [heads]."""
    counters = torch.arange(dim * number, device=seeds.device).view(dim, number) * 2
    seeds = seeds[:, None, None]
    radius = (-2 * (1 - uniform(seeds, counters)).log()).sqrt()
    return radius * (2 * math.pi * uniform(seeds, counters + 1)).cos()


def sample_slots(seeds: Tensor, level: int, interval: int, size: int, samples: int) -> tuple[Tensor, Tensor]:
    """Draw a slot of each stratum of an interval's sorted keys.

    Strata are consecutive slots, equal but for one slot: each slot is drawn with probability 1 over its stratum's size.

    Args:
        seeds: int64 [heads].
    Returns:
        Slots, int64 [heads, samples], and the strata's sizes, int64 [samples].
    """
    intervals = torch.tensor([interval], device=seeds.device)
    counters, firsts, sizes = strata(level, intervals, size, samples)
    return draw_slots(seeds, counters[0], firsts, sizes), sizes


def strata(level: int, intervals: Tensor, size: int, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return counters, first slots and sizes of strata.

    Counters of random numbers are [intervals, samples], the others [samples].
    """
    samples = min(samples, size)
    number = torch.arange(samples + 1, device=intervals.device)
    bounds = number * size // samples
    return (((level << 32) + intervals[:, None]) << 24) + number[:-1], bounds[:-1], bounds.diff()


def draw_slots(seeds: Tensor, counters: Tensor, firsts: Tensor, sizes: Tensor) -> Tensor:
    """Draw a slot of each stratum, int64 [heads, strata]."""
    return firsts + (uniform(seeds[:, None], counters) * sizes).long()


def gray_ranks(x: Tensor, directions: Tensor) -> Tensor:
    """Hash rows to their signs' rank in the Gray code.

    Neighbouring ranks differ in one sign.

    Args:
        x: [..., rows, dim].
        directions: [..., dim, projections], in x's dtype.
    Returns:
        int32 [..., rows], below 2**projections.
    """
    positive = x @ directions > 0
    weights = 1 << torch.arange(directions.shape[-1], dtype=torch.int32, device=x.device)
    ranks = (positive * weights).sum(-1, dtype=torch.int32)
    for shift in (1, 2, 4, 8, 16):
        ranks = ranks ^ (ranks >> shift)
    return ranks


def hash_ranks(q: Tensor, k: Tensor, seeds: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Hash queries and keys by their KV head's directions.

    Products are in the inputs' dtype: keep the ranks for the backward, since another product can round differently.
    """
    directions = projections(seeds, q.shape[-1], number).to(q.dtype)
    of_queries = directions.repeat_interleave(q.shape[1] // k.shape[1], 0)
    return gray_ranks(q.detach(), of_queries), gray_ranks(k.detach(), directions)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _MIX[0]
    x = (x ^ _shifted(x, 27)) * _MIX[1]
    return x ^ _shifted(x, 31)
