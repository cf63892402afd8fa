"""Long texts to token ids in bounded memory: in overlapping segments, joined where both sides agree.

A tokenizer takes about two hundred times a text's size while it works.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import tokenizers as hf

SEGMENT = 1 << 18  # characters
_OVERLAP = 1 << 12
_AT_ONCE = 8  # segments: the library tokenizes those of a batch on several threads

Ids = npt.NDArray[np.int64]


def encode_long(tokenizer: hf.Tokenizer, text: str, segment: int = SEGMENT, overlap: int = _OVERLAP) -> Ids:
    """Ids [n] of a text, those that it has as a whole.

    Neighbouring segments share `overlap` characters, and are joined in the middle of these where their tokens are
    the same in the middle half: so what lies farther away, such as a segment's begin, makes no difference. Where they
    differ, or a token is longer than that, the text is encoded at once.
    """
    joined: list[Ids] = []
    left: Ids | None = None
    for shared, right in _segments(tokenizer, text, segment, overlap):
        if left is not None:
            # Ends as `left` does, and begins as `right` does.
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
    """What each segment shares with the one before it, and its ids."""
    starts = range(0, max(1, len(text) - overlap), segment - overlap)
    for first in range(0, len(starts), _AT_ONCE):
        some = starts[first : first + _AT_ONCE]
        texts = [text[start : start + segment] for start in some]
        # without offsets into the texts, which take several times as long
        for part, encoded in zip(texts, tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True):
            yield part[:overlap], _ids(encoded)


def _ids(encoded: hf.Encoding) -> Ids:
    return np.array(encoded.ids, dtype=np.int64)
