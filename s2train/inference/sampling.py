"""Chooses the next tokens from logits: greedily, or by sampling.

Each sequence has separate random numbers, which depend on the seed and the sequence's number alone. So a sequence is
the same in any batch, and on every tensor parallel rank.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Choose(Protocol):
    """Chooses one token of each sequence, int64 [b], by logits [b, vocab]."""

    def __call__(self, logits: Tensor, /) -> Tensor: ...


def greedy(logits: Tensor) -> Tensor:
    """Choose the likeliest tokens."""
    return logits.argmax(-1)


def among(choose: Choose, vocab_size: int) -> Choose:
    """Choose among the first `vocab_size` tokens.

    These are the tokenizer's: the model's embedding may have more rows.
    """
    return lambda logits: choose(logits[:, :vocab_size])


class Sampler:
    """Samples from the likeliest tokens at a temperature.

    Args:
        numbers: number of each sequence, which its random numbers depend on.
        temperature: divides the logits; more than 0.
        top_k: keep the `top_k` likeliest tokens; None: all.
        top_p: then keep the fewest likeliest tokens that together have this probability (arXiv 1904.09751).
    """

    def __init__(
        self, seed: int, numbers: Sequence[int], temperature: float, top_k: int | None = None, top_p: float = 1.0
    ) -> None:
        self._temperature, self._top_k, self._top_p = temperature, top_k, top_p
        # On the CPU, and so the same on every device.
        self._generators = [torch.Generator().manual_seed(_mixed(seed, number)) for number in numbers]

    def __call__(self, logits: Tensor) -> Tensor:
        """Sample; tokens with a logit of -inf are never chosen."""
        kept, tokens = probabilities(logits, self._temperature, self._top_k, self._top_p)
        drawn = torch.stack([torch.rand((), generator=one, dtype=torch.float64) for one in self._generators])
        cumulative = kept.cumsum(-1)
        # The first token whose cumulative probability exceeds the draw; its total may be below 1 by rounding.
        place = torch.searchsorted(cumulative, drawn.to(logits.device)[:, None] * cumulative[:, -1:], right=True)
        last = (kept > 0).sum(-1, keepdim=True) - 1
        return tokens.gather(-1, place.minimum(last)).squeeze(-1)


def probabilities(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> tuple[Tensor, Tensor]:
    """Return probabilities in falling order, and their tokens.

    A token that is left out has probability 0.

    Args:
        logits: [b, vocab].
    Returns:
        float64 and int64 [b, vocab, or top_k if that is less].
    """
    ordered, tokens = logits.double().sort(stable=True, dim=-1, descending=True)
    if top_k is not None:
        ordered, tokens = ordered[:, :top_k], tokens[:, :top_k]
    shares = ((ordered - ordered[:, :1]) / temperature).softmax(-1)  # a small temperature overflows nothing
    before = shares.cumsum(-1) - shares
    kept = shares.masked_fill(before >= top_p, 0.0)
    return kept / kept.sum(-1, keepdim=True), tokens


def _mixed(seed: int, number: int) -> int:
    """Mix a seed and a sequence's number.

    Sequences with neighbouring numbers then have unrelated random numbers.
    """
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> np.uint64(1))
