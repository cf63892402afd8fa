"""Pattern of a window that grows with the query's position, and sinks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from s2train.layouts.patterns.base import Pattern, PatternError, at_least


@dataclass(frozen=True)
class Span(Pattern):
    """Keep a window that grows with the query's position, and sinks.

    Query block i keeps the distances below base + floor(slope (i + 1)), and the first `sinks` key blocks. This is the
    span α + β N of MoA (arXiv 2406.14909), with N the length up to the query instead of the whole sequence: so a
    prefix is attended as the whole sequence is, and decoding as training. The pattern is KV-efficient, since the window
    grows by at most one block per query block.

    Raises:
        PatternError: base below 1, a slope outside [0, 1), or sinks below 0.
    """

    base: int
    slope: float
    sinks: int = 0

    kv_efficient = True

    def __post_init__(self) -> None:
        at_least(1, base=self.base)
        at_least(0, sinks=self.sinks)
        if not 0 <= self.slope < 1:
            problem = "outside 0 to 1, 1 excluded"
            raise PatternError("slope", self.slope, problem, "Set the share of earlier blocks to keep, such as 0.25.")

    def window(self, query: Tensor) -> Tensor:
        """Return the window of query blocks (int64), in blocks."""
        return self.base + ((query + 1).double() * self.slope).floor().long()

    def keep(self, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & ((query < key + self.window(query)) | (key < self.sinks))

    def form(self) -> str:
        slope = f" + {self.slope:g} of the length" if self.slope else ""
        return f"span {self.base}{slope}" + (f", sinks {self.sinks}" if self.sinks else "")


def union_counts(spans: list[Span], num_blocks: int) -> Tensor:
    """Count the key blocks that any span keeps, per query block.

    The result is int64 [num_blocks].
    """
    window, query = widest(spans, num_blocks), torch.arange(num_blocks)
    before = (query + 1 - window).clamp(min=0)  # blocks before the widest window, of which the sinks are kept
    return query + 1 - before + before.clamp(max=max(span.sinks for span in spans))


def widest(spans: list[Span], num_blocks: int) -> Tensor:
    """Return the widest window of each query block: int64 [num_blocks]."""
    query = torch.arange(num_blocks)
    return torch.stack([span.window(query) for span in spans]).amax(0)
