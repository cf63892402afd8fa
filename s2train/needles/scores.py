"""Shares of right answers, how sure they are, and the length up to which a model can be relied on."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

RULER_THRESHOLD = 0.856  # of Llama2-7B at 4k tokens, which RULER asks of a length to count as effective
_Z = 1.959963984540054  # two-sided 95 % of a normal distribution


def wilson_interval(correct: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a share, which has a width at 0 and 1 too (Wilson, 1927, JASA 22, 209-212)."""
    share, spread = correct / trials, _Z**2 / trials
    middle = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return middle - half if correct else 0.0, middle + half if correct < trials else 1.0


@dataclass(frozen=True)
class Score:
    """So many of `trials` right: answers, or values."""

    correct: int
    trials: int

    @property
    def share(self) -> float:
        return self.correct / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        """See `wilson_interval`."""
        return wilson_interval(self.correct, self.trials)

    def as_json(self) -> dict[str, object]:
        low, high = self.interval
        return {
            "correct": self.correct,
            "trials": self.trials,
            "score": self.share,
            "interval": [round(low, 6), round(high, 6)],
        }


def effective_length(scores: Iterable[tuple[int, Score]], threshold: float) -> int | None:
    """The largest length whose score is `threshold` or more, as RULER defines it (arXiv:2404.06654); None: no length.

    Args:
        scores: lengths (tokens) and what was scored there, over all depths.
    """
    return max((length for length, score in scores if score.share >= threshold), default=None)
