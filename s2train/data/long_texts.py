"""Encodes long texts in bounded memory.

A tokenizer needs about two hundred times a text's size in memory. So a text is encoded in overlapping segments, which
are joined where both sides agree.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import tokenizers as hf

SEGMENT = 1 << 18  # characters
_OVERLAP = 1 << 12
_BATCH = 8  # segments; the library encodes the texts of a batch on several threads

Ids = npt.NDArray[np.int64]


def encode_long(tokenizer: hf.Tokenizer, text: str, segment: int = SEGMENT, overlap: int = _OVERLAP) -> Ids:
    """Encode a text in segments.

    Returns ids [n], the same as for the whole text. Neighbouring segments share `overlap` characters. They are joined
    in the middle of the overlap if their tokens agree in its middle half, which shows that the segments' ends have no
    influence there. If they disagree, or a token is longer than the middle half, the whole text is encoded at once.
    """
    joined: list[Ids] = []
    left: Ids | None = None
    for shared, right in _segments(tokenizer, text, segment, overlap):
        if left is not None:
            # `shared` is the end of `left` and the beginning of `right`.
            [encoded] = tokenizer.encode_batch([shared], add_special_tokens=False)
            ids, begins = _ids(encoded), np.array([begin for begin, _ in encoded.offsets], dtype=np.int64)
            low, middle, high = (int((begins < overlap * quarter // 4).sum()) for quarter in (1, 2, 3))
            same = np.array_equal(left[len(left) - len(ids) + low :], ids[low:])
            same = same and np.array_equal(right[:high], ids[:high])
            if not same or low == high or (np.diff(begins) < 0).any():
                return _ids(tokenizer.encode(text, add_special_tokens=False))
            joined.append(left[: len(left) - len(ids) + middle])
            right = right[middle:]
        left = right
    assert left is not None
    return np.concatenate([*joined, left])


def _segments(tokenizer: hf.Tokenizer, text: str, segment: int, overlap: int) -> Iterator[tuple[str, Ids]]:
    """Yield each segment's overlap with the one before, and its ids."""
    starts = range(0, max(1, len(text) - overlap), segment - overlap)
    for first in range(0, len(starts), _BATCH):
        texts = [text[start : start + segment] for start in starts[first : first + _BATCH]]
        # the fast method omits offsets, which would take several times longer
        for part, encoded in zip(texts, tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True):
            yield part[:overlap], _ids(encoded)


def _ids(encoded: hf.Encoding) -> Ids:
    return np.array(encoded.ids, dtype=np.int64)
