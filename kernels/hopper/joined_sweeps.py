"""Let a program join the sweep over queries of those that run.

Long programs visit one head's queries from the last to the first. Those that start together load each tile of q and
dO from memory once, and find its sums of dq in the L2 cache. But programs start when a multiprocessor becomes free,
and would sweep alone. So a program begins at the tile where another one of its head will be, and visits the skipped
tiles last. When programs start is simulated, as in `program_order`.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .program_order import START_STEPS

_HEAD_SHIFT = 22  # bits of a step below the head: see `BackwardSchedule`
_TILE_MASK = 2**20 - 1
_LEAST_STEPS = 64  # a program with fewer of one head sweeps alone
_LEAST_SHARED = 0.5  # of a program's sweep: less is not worth starting elsewhere

Tiles = NDArray[np.int64]


@dataclass(frozen=True)
class _Sweep:
    """The longest run of one head among a program's steps without a mask.

    `begin` counts from the program's first step; `tiles` are descending, negated for searching.
    """

    begin: int
    head: int
    tiles: Tiles


@dataclass(frozen=True)
class _Running:
    """A sweep that starts at a time (in steps) with its n-th tile."""

    head: tuple[int, int, int]
    sweep: _Sweep
    time: int
    start: int

    def shared(self, other: _Sweep, time: int) -> tuple[int, int]:
        """Return how many tiles `other` visits with this one from a time on, and the first."""
        elapsed, tiles = time - self.time, self.sweep.tiles
        if not 0 <= elapsed < len(tiles):
            return 0, 0
        start = int(np.searchsorted(other.tiles, tiles[(self.start + elapsed) % len(tiles)]))
        end = int(np.searchsorted(other.tiles, min(tiles[-1], other.tiles[-1]), side="right"))
        return min(end - start, len(tiles) - elapsed), start


def joined_sweeps(meta: Tensor, steps: Tensor, at_once: int) -> tuple[Tensor, Tensor]:
    """Return `meta` and `steps` in which long programs join sweeps.

    Rows of `meta` (int64) are in the order in which programs start; `at_once` run together. Programs that begin
    elsewhere get lists of steps of their own, behind all others.
    """
    lists = steps.cpu().numpy()
    found: dict[tuple[int, int], _Sweep | None] = {}
    ends = [(0, place) for place in range(at_once)]
    running: dict[int, _Running] = {}
    rows, added = meta.tolist(), [steps]
    num_steps = len(steps)
    for row in rows:
        now, place = heapq.heappop(ends)
        running.pop(place, None)
        kv_head, _, _, first, masked, count, _, sequence = row
        heapq.heappush(ends, (now + count + START_STEPS, place))
        if (first, count) not in found:
            found[first, count] = _sweep(lists[first : first + count], masked)
        sweep = found[first, count]
        if sweep is None:
            continue
        head, time = (sequence, kv_head, sweep.head), now + START_STEPS + sweep.begin
        same_head = (other for other in running.values() if other.head == head)
        shared, start = max((other.shared(sweep, time) for other in same_head), default=(0, 0))
        if shared < _LEAST_SHARED * len(sweep.tiles):
            start = 0
        running[place] = _Running(head, sweep, time, start)
        if start:
            own = lists[first : first + count].copy()
            part = slice(sweep.begin, sweep.begin + len(sweep.tiles))
            own[part] = np.roll(own[part], -start)
            row[3], row[6] = num_steps, int(own[0])
            added.append(torch.from_numpy(own).to(steps.device))
            num_steps += count
    return torch.tensor(rows, dtype=meta.dtype, device=meta.device), torch.cat(added)


def _sweep(steps: NDArray[np.int32], masked: int) -> _Sweep | None:
    """Find a program's sweep among its steps; None if it is short."""
    unmasked = steps[masked:]
    if len(unmasked) < _LEAST_STEPS:
        return None
    head = unmasked >> _HEAD_SHIFT
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(head)) + 1, [len(unmasked)]])
    longest = int(np.diff(bounds).argmax())
    begin, end = int(bounds[longest]), int(bounds[longest + 1])
    if end - begin < _LEAST_STEPS:
        return None
    tiles = -((unmasked[begin:end] >> 2) & _TILE_MASK).astype(np.int64)
    return _Sweep(masked + begin, int(head[begin]), tiles)
