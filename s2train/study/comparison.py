"""Compares variants at equal tokens and at equal GPU time."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import numpy as np

from s2train.needles.scores import wilson_interval
from s2train.study import speed
from s2train.study.recall import Recall
from s2train.study.results import Result
from s2train.study.variants import PHASES, VARIANTS

BASELINE = "dense"  # whose losses others are compared with


@dataclass(frozen=True)
class Group:
    """Runs of one variant in one phase that differ in their seeds.

    Attributes:
        gpus: number of GPUs whose times and memory are given: the fewest of the phase's runs.
        speed: measurement of first steps on them; None: none.
        has_times: whether time and throughput are given: not if the phase's are of several GPU models.
    """

    variant: str
    phase: str
    results: tuple[Result, ...]
    gpus: int
    speed: Mapping[str, Any] | None = None
    has_times: bool = True

    @property
    def losses(self) -> list[float]:
        """Held-out loss of each seed at the end."""
        return [result.loss for result in self.results]

    @property
    def by_seed(self) -> dict[int, Result]:
        return {result.run.seed: result for result in self.results}

    def paired(self, baseline: "Group") -> list[tuple[Result, Result]]:
        """Pair each result with the baseline's of the same seed.

        Seeds without one are left out. Runs of one seed see the same data in the same order.
        """
        theirs = baseline.by_seed
        return [(own, theirs[seed]) for seed, own in self.by_seed.items() if seed in theirs]

    @property
    def timed(self) -> list[Result]:
        """Results of runs whose times are given: alone on `gpus` GPUs."""
        return [result for result in self.results if self._is_timed(result)]

    def _is_timed(self, result: Result) -> bool:
        return not result.shared_gpu and result.gpus == self.gpus

    @property
    def devices(self) -> set[str]:
        """GPU models of the runs or steps of `speeds`."""
        found = {result.device for result in self.timed} or {self.speed["device"] if self.speed else None}
        return {device for device in found if device is not None}

    @property
    def speeds(self) -> list[tuple[float, float | None]]:
        """Throughput of one GPU, and MFU if known.

        Of runs in `timed`, or else of first steps.
        """
        if not self.has_times:
            return []
        if self.timed:
            return [(result.summary.tokens_per_s / result.gpus, result.summary.mfu) for result in self.timed]
        return [(self.speed["tokens_per_s"] / self.speed["gpus"], self.speed["mfu"])] if self.speed else []

    @property
    def tokens_per_s(self) -> float | None:
        """Mean throughput of one GPU; None if it is unknown."""
        return mean(tokens_per_s for tokens_per_s, _ in self.speeds) if self.speeds else None

    @property
    def mfu(self) -> float | None:
        """Mean MFU; None if it is unknown."""
        known = [mfu for _, mfu in self.speeds if mfu is not None]
        return mean(known) if known else None

    @property
    def memory(self) -> float | None:
        """Peak GiB of one of `gpus` GPUs; None if it is unknown.

        Of runs on them, or else of first steps.
        """
        known = [result.summary.peak_memory_gib for result in self.results if result.gpus == self.gpus]
        if self.speed is not None and not known:
            known = [self.speed["peak_memory_gib"]]
        return max(known, default=None)

    def gpu_seconds(self, result: Result) -> list[float]:
        """Return the GPU time of a run's evaluations.

        For a run that is not in `timed`, it is that of its steps at the speed of `tokens_per_s`; empty if that is
        unknown.
        """
        if self.tokens_per_s is None:
            return []
        seconds = [seconds for _, seconds, _ in result.held_out]
        if self._is_timed(result):
            return seconds
        scale = result.summary.tokens_per_s / result.gpus / self.tokens_per_s
        return [scale * one for one in seconds]

    def losses_at(self, gpu_seconds: float) -> list[float]:
        """Interpolate each seed's held-out loss linearly at that GPU time.

        There are none if a run's GPU time is unknown, or if its first evaluation came later.
        """
        found = []
        for result in self.results:
            seconds = self.gpu_seconds(result)
            if not seconds or seconds[0] > gpu_seconds:
                return []
            found.append(float(np.interp(gpu_seconds, seconds, [loss for _, _, loss in result.held_out])))
        return found

    def recalls(self) -> dict[int, tuple[float, float, float]]:
        """Return recall by step: mean, lowest and highest over layers and seeds."""
        rows: dict[int, list[Recall]] = defaultdict(list)
        for result in self.results:
            for one in result.recall:
                rows[one.step].append(one)
        return {
            step: (mean(one.mean for one in own), min(one.lowest for one in own), max(one.highest for one in own))
            for step, own in sorted(rows.items())
        }

    def by_position(self) -> dict[tuple[int, int], list[float]]:
        """Return the held-out losses of all seeds by range of positions.

        A range has none where a seed has no loss.
        """
        rows = {}
        for parts in zip(*(result.by_position for result in self.results), strict=True):
            losses = [loss for _, _, loss in parts if loss is not None]
            rows[parts[0][0], parts[0][1]] = losses if len(losses) == len(parts) else []
        return rows

    def changes(self, stop: int) -> list[float]:
        """Return how much each seed's loss changes after position `stop`.

        It is the loss in the last range of positions less that in the range up to `stop`; empty if one is missing.
        """
        rows = self.by_position()
        earlier = next((losses for (_, end), losses in rows.items() if end == stop), [])
        *_, last = rows.values()
        return [after - before for before, after in zip(earlier, last, strict=True)] if earlier and last else []

    def completions(self) -> dict[int, tuple[float, tuple[float, float], float]]:
        """Return the shares of completed identifiers by length, summed over seeds.

        For each length: the share with the definition, its 95 % interval, and the share without the definition.
        """
        counts: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0])
        for result in self.results:
            for row in result.probes["completion"] if result.probes else ():
                own = counts[row["length"]]
                own[0] += row["with_definition"]["correct"]
                own[1] += row["without_definition"]["correct"]
                own[2] += row["with_definition"]["trials"]
        return {
            length: (given / trials, wilson_interval(given, trials), without / trials)
            for length, (given, without, trials) in sorted(counts.items())
        }

    def recurrences(self) -> dict[int, tuple[int, float, float]]:
        """Return losses on recurring identifiers by the start of the distance range.

        Each range has the number of occurrences, and the mean losses on the second one and on the first, over all
        seeds.
        """
        rows: dict[int, list[tuple[int, float, float]]] = defaultdict(list)
        for result in self.results:
            for row in result.probes["recurrence"]["by_distance"] if result.probes else ():
                rows[row["from"]].append((row["count"], row["second_loss"], row["first_loss"]))
        found = {}
        for start, own in sorted(rows.items()):
            counts, second, first = zip(*own, strict=True)
            means = (float(np.average(losses, weights=counts)) for losses in (second, first))
            found[start] = (sum(counts), next(means), next(means))
        return found


def groups(results: Sequence[Result], speeds: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, list[Group]]:
    """Group results by phase and variant, in the study's order.

    Phases and variants that are not in the study follow. A phase on several GPU models has no times: those of one model
    say nothing about another's. Of several numbers of GPUs, the fewest have times.

    Args:
        speeds: measurements of first steps by `speed.key`.
    """
    by_key: dict[tuple[str, str], list[Result]] = defaultdict(list)
    fewest: dict[str, int] = {}
    for result in results:
        phase = result.run.phase
        by_key[phase, result.run.variant].append(result)
        fewest[phase] = min(result.gpus, fewest.get(phase, result.gpus))

    def order(names: Sequence[str], name: str) -> tuple[int, str]:
        return (names.index(name) if name in names else len(names), name)

    keys = sorted(by_key, key=lambda key: (order(tuple(PHASES), key[0]), order(tuple(VARIANTS), key[1])))
    grouped: dict[str, list[Group]] = {}
    for phase, variant in keys:
        own = sorted(by_key[phase, variant], key=lambda result: result.run.seed)
        measured = (speeds or {}).get(speed.key(own[0].run, fewest[phase]))
        grouped.setdefault(phase, []).append(Group(variant, phase, tuple(own), fewest[phase], measured))
    return {
        phase: [replace(group, has_times=False) for group in own] if len(by_device(own)) > 1 else own
        for phase, own in grouped.items()
    }


def by_device(phase: Sequence[Group]) -> dict[str, list[str]]:
    """Name variants by the GPU model of their times."""
    found: dict[str, list[str]] = defaultdict(list)
    for group in phase:
        for device in sorted(group.devices):
            found[device].append(group.variant)
    return dict(found)


def find_baseline(phase: Sequence[Group]) -> Group | None:
    """Return a phase's dense runs; None if there are none."""
    return next((group for group in phase if group.variant == BASELINE), None)


def common_gpu_seconds(phase: Sequence[Group]) -> float | None:
    """Return the GPU time of a phase's fastest run.

    All runs of the phase with a known GPU time can be compared up to this time. None if there are none.
    """
    times = (group.gpu_seconds(result) for group in phase for result in group.results)
    return min((own[-1] for own in times if own), default=None)
