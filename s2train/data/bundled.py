"""Locates the bundled corpus, and computes the unigram entropy of any corpus."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

# The three texts are cut into documents, so that some can be held out.
BUNDLED_DOCUMENT_CHARS = 10_000


def bundled_corpus_files() -> list[Path]:
    """Text files of the bundled corpus, in a fixed order.

    `corpus/LICENSE.md` describes them.
    """
    return sorted((Path(__file__).parent / "corpus").glob("*.txt"))


def unigram_entropy(counts: npt.ArrayLike) -> float:
    """Entropy of the token frequencies, in nats per token.

    H = −Σ p ln p, with p = counts / Σ counts. It is the lowest loss of a model that ignores context, so a language
    model that learns gets below it.

    Args:
        counts: how often each token occurs, [vocab_size]; at least one is above 0.
    """
    occurring = np.asarray(counts, dtype=np.float64)
    occurring = occurring[occurring > 0]
    p = occurring / occurring.sum()
    return float(-(p * np.log(p)).sum())


def count_ids(tokens: npt.NDArray[np.integer], vocab_size: int) -> npt.NDArray[np.int64]:
    """Count how often each id occurs in `tokens`.

    Args:
        tokens: [n]; may be a large memory map.
    Returns:
        int64 [vocab_size].
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    step = 1 << 24
    for start in range(0, len(tokens), step):
        counts += np.bincount(tokens[start : start + step], minlength=vocab_size)
    return counts
