"""Judges published guidelines by one rule from the study's losses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from s2train.study.comparison import Group
from s2train.study.tables import UNKNOWN, table
from s2train.study.variants import PHASES

# Margins and factors were set before the runs of 300M tokens, and after those of the 40M tier.
MARGIN = 0.02  # nats: "as good" means worse by less than this
ONE_SEED = 2  # a difference of one seed alone must exceed this multiple of the noise
NOISE_KINDS = 2  # kinds with several seeds, of which the noise is known


class Verdict(Enum):
    """What the runs say about a claim."""

    SUPPORTED = "supported"
    NOT_SUPPORTED = "not supported"
    NOT_DISTINGUISHABLE = "not distinguishable here"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Guideline:
    """A claim that variants have a lower loss than others.

    Attributes:
        pairs: of each, the first has the lower loss.
        margin: nats by which the first may still be worse.
    """

    claim: str
    pairs: tuple[tuple[str, str], ...]
    margin: float = 0.0


GUIDELINES = (
    Guideline("Heterogeneous heads are better than homogeneous ones", (("hybrid", "homogeneous"),)),
    Guideline("Heads that together see all blocks are better than heads that don't", (("hybrid", "grouped"),)),
    Guideline("A hybrid is as good as dense attention", (("hybrid", "dense"),), MARGIN),
    Guideline("More dense layers are better", (("hybrid", "d1s7"), ("d1s7", "d1s15"), ("d1s15", "sparse"))),
    Guideline("S2 layers are better than sliding windows of equal density", (("hybrid", "window"),)),
)
RULE = f"""\
The last one is this study's own question; the others are published. Losses are those at equal tokens, over all
positions. The noise of a phase is the largest difference between seeds of one kind. Comparisons are of runs
of one seed.

- Supported: each difference is below zero by more than the noise, and by more than the differences vary over the seeds.
- Not supported: each is above zero by as much.
- Not distinguishable here: neither, or fewer than {NOISE_KINDS} kinds have several seeds.
- The difference of a single seed must exceed the noise {ONE_SEED} times. "As good" sets {MARGIN} nats in place of zero.
- Of several comparisons all must be supported; if one is not supported, the guideline isn't.
"""


def noise_of(phase: Sequence[Group]) -> float | None:
    """Return the largest spread over seeds of a kind's losses.

    None if fewer than `NOISE_KINDS` kinds have several seeds.
    """
    spreads = [_range(group.losses) for group in phase if len(group.losses) > 1]
    return max(spreads) if len(spreads) >= NOISE_KINDS else None


def judge(differences: Sequence[float], noise: float | None, margin: float = 0.0) -> Verdict:
    """Judge the claim that differences are below a margin.

    Args:
        differences: of each seed.
        noise: of the phase; None: unknown.
    """
    if not differences:
        return Verdict.NOT_MEASURED
    if noise is None:
        return Verdict.NOT_DISTINGUISHABLE
    needed = ONE_SEED * noise if len(differences) == 1 else max(noise, _range(differences))
    if all(one - margin < -needed for one in differences):
        return Verdict.SUPPORTED
    if all(one - margin > needed for one in differences):
        return Verdict.NOT_SUPPORTED
    return Verdict.NOT_DISTINGUISHABLE


def combine(verdicts: Sequence[Verdict]) -> Verdict:
    """Judge a guideline by the verdicts on its comparisons."""
    for decisive in (Verdict.NOT_SUPPORTED, Verdict.NOT_MEASURED, Verdict.NOT_DISTINGUISHABLE):
        if decisive in verdicts:
            return decisive
    return Verdict.SUPPORTED


def guidelines_section(grouped: Mapping[str, Sequence[Group]]) -> str:
    """Format the verdicts on each phase that trains from scratch."""
    parts = [f"## Guidelines\n\n{RULE}"]
    for name, own in grouped.items():
        if PHASES[name].after is None:
            parts.append(_phase(name, own))
    if len(parts) == 1:
        parts.append("No phase that trains from scratch has results: nothing is measured.\n")
    return "\n".join(parts)


def _phase(name: str, own: Sequence[Group]) -> str:
    noise = noise_of(own)
    known = f"Noise: {noise:.4f} nats." if noise is not None else "Noise: unknown."
    there = {group.variant: group for group in own}
    rows = []
    for guideline in GUIDELINES:
        verdicts = []
        for better, other in guideline.pairs:
            differences = _differences(there, better, other)
            verdicts.append(judge(list(differences.values()), noise, guideline.margin))
            shown = ", ".join(f"{value:+.4f} (seed {seed})" for seed, value in differences.items())
            said = verdicts[-1].value
            if missing := [variant for variant in (better, other) if variant not in there]:
                said += f": no {' and no '.join(missing)}"
            elif not differences:
                said += ": no seed in common"
            claim = guideline.claim if len(verdicts) == 1 else ""
            rows.append([claim, f"{better} less {other}", shown or UNKNOWN, said])
        if len(verdicts) > 1:
            rows.append(["", "all of these", "", combine(verdicts).value])
    heads = ("guideline", "comparison", "difference in loss", "verdict")
    return f"### {PHASES[name].title}\n\n{known}\n\n{table(heads, rows)}"


def _differences(there: Mapping[str, Group], better: str, other: str) -> dict[int, float]:
    """Return the difference in loss of each seed that both have."""
    if better not in there or other not in there:
        return {}
    return {own.run.seed: own.loss - theirs.loss for own, theirs in there[better].paired(there[other])}


def _range(values: Sequence[float]) -> float:
    return max(values) - min(values)
