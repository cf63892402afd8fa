"""Measures loss and perplexity of a text, whole and by position."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from s2train.evaluation.windows import Window, batches
from s2train.training.loss_by_position import HeldOut, position_bins, position_edges, sum_by_position

Score = Callable[[Sequence[Window]], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class TextLoss:
    """Loss of a text.

    Attributes:
        tokens: predicted tokens.
        correct: of these, the ones that were the likeliest.
        bytes: of the text in UTF-8; None if not every token of it was predicted.
        held_out: losses in nats per token, by position in the window.
    """

    tokens: int
    correct: int
    bytes: int | None
    held_out: HeldOut

    @property
    def perplexity(self) -> float:
        """Exponential of the loss; infinite above what a float holds."""
        return math.exp(self.held_out.loss) if self.held_out.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Loss in bits, for each byte of the text: comparable between tokenizers."""
        return self.held_out.loss * self.tokens / math.log(2) / self.bytes if self.bytes else None

    def as_json(self) -> dict[str, Any]:
        """Return all figures by name."""
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            **asdict(self.held_out),
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "accuracy": self.correct / self.tokens,
        }


def measure(
    windows: Sequence[Window],
    length: int,
    batch_size: int,
    score: Score,
    device: torch.device,
    text_bytes: int | None,
    group: torch.distributed.ProcessGroup | None = None,
) -> TextLoss:
    """Measure the loss of windows; collective.

    Args:
        windows: of at most `length` tokens; the ranks of `group` share them.
        group: ranks that hold the same model; None: this one alone.
    """
    rank, ranks = (group.rank(), group.size()) if group is not None else (0, 1)
    edges = position_edges(length)
    bins, ranges = position_bins(edges, 0, 1, device), len(edges) - 1
    sums = torch.zeros(ranges, 2, dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for batch in list(batches(windows, batch_size))[rank::ranks]:
        losses, likeliest, counted = score(batch)
        sums += sum_by_position(losses, counted, bins[: losses.shape[1]], ranges)
        correct += (likeliest & counted).sum()
    if group is not None:
        for summed in (sums, correct):
            torch.distributed.all_reduce(summed, group=group)
    return TextLoss(int(sums[:, 1].sum()), int(correct), text_bytes, HeldOut.of(edges, sums.cpu()))
