"""Computes how many epochs of each dataset a run takes."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from s2train.config import DataConfig
from s2train.data.blend import BUNDLED_PREFIX, parse_blend
from s2train.data.bundled import bundled_corpus_files
from s2train.data.indexed import read_document_lengths
from s2train.data.parts import training_part
from s2train.data.splits import split_documents_range
from s2train.errors import ConfigError


@dataclass(frozen=True)
class Epochs:
    """Epochs of the training part of one dataset.

    Attributes:
        share: share of the run's samples.
        tokens: tokens in the training part; an estimate for the bundled corpus before it is prepared.
        epochs: how often each token is trained on.
    """

    prefix: str
    share: float
    tokens: int
    epochs: float


def training_epochs(data: DataConfig, samples: int, seq_length: int) -> list[Epochs]:
    """Compute the epochs of each dataset in `data.path`.

    Mock data have none. A dataset that a blend names twice is counted once, with the samples of both.

    Args:
        samples: training samples of the run.
        seq_length: tokens of a sample.

    Raises:
        ConfigError: a dataset is missing or broken, or its training part is empty.
    """
    data = training_part(data)
    blend = parse_blend(data.path)
    shares: dict[str, float] = {}
    for prefix, weight in zip(blend.prefixes, blend.weights, strict=True):
        shares[prefix] = shares.get(prefix, 0.0) + weight
    found = []
    for prefix, share in shares.items():
        if (tokens := _training_tokens(prefix, data)) == 0:
            raise ConfigError("data.split", data.split, f"leaves no tokens of {prefix} to train on", "Change the split")
        # A sample's last token is the next one's first.
        found.append(Epochs(prefix, share, tokens, share * samples * seq_length / max(tokens - 1, 1)))
    return found


def describe_epochs(data: DataConfig, found: Sequence[Epochs]) -> list[str]:
    """Describe each dataset in a line, with a warning above `data.warn_epochs`."""
    lines = [
        f"{one.prefix}: {_times(one.epochs)} epochs of {one.tokens:,} training tokens"
        + (f", {one.share:.3g} of the samples" if len(found) > 1 else "")
        for one in found
    ] or ["mock: synthetic, without epochs"]
    return lines + [
        f"warning: the run takes {_times(one.epochs)} epochs of {one.prefix}, above data.warn_epochs="
        f"{data.warn_epochs:g}. Use more data, "
        + ("a smaller weight in data.path, " if len(found) > 1 else "")
        + f"fewer train.steps, or set data.warn_epochs={math.ceil(one.epochs)}"
        for one in found
        if one.epochs > data.warn_epochs
    ]


def _times(epochs: float) -> str:
    return f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.3g}"


def _training_tokens(prefix: str, data: DataConfig) -> int:
    if prefix == BUNDLED_PREFIX and not os.path.isfile(f"{prefix}.idx"):  # prepared on first use, one token per byte
        nbytes = sum(file.stat().st_size for file in bundled_corpus_files())
        train, _, _ = split_documents_range(data.split, 1000)
        return nbytes * len(train) // 1000
    lengths = read_document_lengths(prefix)
    train, _, _ = split_documents_range(data.split, len(lengths))
    return int(lengths[train.start : train.stop].sum(dtype=np.int64))
