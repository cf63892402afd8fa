"""Formats the cells and tables of the study's report."""

from collections.abc import Iterable, Sequence
from statistics import mean

from s2train.study.settings import Recipe

UNKNOWN = "–"  # a cell of what was not measured


def spread(values: Sequence[float], sign: str = "") -> str:
    """Format the mean and the range.

    Args:
        sign: "+" to show that of positive values too.
    """
    if not values:
        return UNKNOWN
    middle, low, high = (f"{value:{sign}.4f}" for value in (mean(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} [{low}, {high}]"


def recipes(made_by: Iterable[Recipe], lr_factor: float) -> str:
    """Name the learning rates and batches of runs.

    Args:
        lr_factor: of their phase.
    """
    found = sorted({(one.lr * lr_factor, one.batch_tokens) for one in made_by})
    return "; ".join(f"learning rate {lr:g}, {batch_tokens:,} tokens a step" for lr, batch_tokens in found)


def millions(tokens: int) -> str:
    """Format a phase's tokens, such as 300M or 0.13M."""
    return f"{tokens / 1e6:,.{0 if tokens >= 1e6 else 2}f}M"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
