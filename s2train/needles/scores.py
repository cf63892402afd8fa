"""Computes scores, their confidence intervals and the effective length."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

RULER_THRESHOLD = 0.856  # score of Llama2-7B at 4k tokens, which RULER requires of an effective length
Z_95 = 1.959963984540054  # two-sided 95 % of a normal distribution


def wilson_interval(correct: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson, 1927, JASA 22, 209-212).

    Unlike simpler intervals, it has a width at 0 and 1 too.
    """
    share, spread = correct / trials, Z_95**2 / trials
    middle = (share + spread / 2) / (1 + spread)
    half = Z_95 / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return middle - half if correct else 0.0, middle + half if correct < trials else 1.0


@dataclass(frozen=True)
class Score:
    """Number of correct answers, or of values found, among `trials`."""

    correct: int
    trials: int

    def __add__(self, other: "Score") -> "Score":
        return Score(self.correct + other.correct, self.trials + other.trials)

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
    """Largest length whose score reaches `threshold`, or None.

    RULER's definition (arXiv:2404.06654).

    Args:
        scores: lengths (tokens) and their scores over all depths.
    """
    return max((length for length, score in scores if score.share >= threshold), default=None)
