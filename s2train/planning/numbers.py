"""Formats numbers of plans: counts, times and bytes."""

from s2train.costs.memory import GIB


def with_unit(number: float) -> str:
    """Format a number with two decimals and a unit."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"


def time_text(seconds: float) -> str:
    """Format seconds, in ms below one."""
    return f"{1e3 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def duration(seconds: float) -> str:
    """Format seconds in the largest unit of which there are two."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def gib(nbytes: int) -> str:
    """Format bytes as GiB."""
    return f"{nbytes / GIB:.3f}"
