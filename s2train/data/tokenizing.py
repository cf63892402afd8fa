"""Pieces of text to token ids in several processes."""

import functools
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process

import numpy as np
import numpy.typing as npt

from s2train.data.sources import Piece
from s2train.data.tokenizers import Tokenizer, load_tokenizer
from s2train.errors import TrainingError

_AHEAD = 4  # pieces in flight, a worker


@dataclass(frozen=True)
class Encoding:
    """How pieces are tokenized.

    Attributes:
        tokenizer: as `load_tokenizer` takes it.
        dtype: of the ids, a name of NumPy's.
        text_key: see `Piece.documents`.
    """

    tokenizer: str
    dtype: str
    text_key: str


@dataclass(frozen=True)
class Encoded:
    """A tokenized piece.

    Attributes:
        source, position: of the piece.
        lengths: tokens of each document, its end included, int64 [n].
        tokens: of all documents, one after the other.
        text_bytes: of the documents, as UTF-8.
        is_blank: whether they are white space alone, or none.
    """

    source: int
    position: int
    lengths: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.integer]
    text_bytes: int
    is_blank: bool


def encode(piece: Piece, encoding: Encoding) -> Encoded:
    """Tokenize a piece in this process; BadDocumentError for what can't be read."""
    tokenizer = _tokenizer(encoding.tokenizer)
    texts = list(piece.documents(encoding.text_key))
    ends = np.array([tokenizer.eod])
    parts = [part for ids in tokenizer.encode_many(texts) for part in (ids, ends)]
    tokens = np.concatenate(parts).astype(encoding.dtype) if parts else np.empty(0, encoding.dtype)
    lengths = np.array([len(ids) + 1 for ids in parts[::2]], dtype=np.int64)
    text_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
    is_blank = all(text.isspace() for text in texts)
    return Encoded(piece.source, piece.position, lengths, tokens, text_bytes, is_blank)


def encode_all(pieces: Iterable[Piece], encoding: Encoding, workers: int) -> Iterator[Encoded]:
    """Tokenize pieces, in their order, in `workers` processes; in this one if that is 1.

    Raises:
        BadDocumentError: a piece can't be read.
        TrainingError: a worker was killed.
    """
    if workers == 1:
        yield from (encode(piece, encoding) for piece in pieces)
        return
    # Spawned: threads of this process, torch's and the tokenizer's, would not survive a fork.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_end_with_parent)
    try:
        waiting: deque[Future[Encoded]] = deque()
        for piece in pieces:
            waiting.append(pool.submit(encode, piece, encoding))
            if len(waiting) >= _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise TrainingError(
            "a worker was killed, perhaps for want of memory. Run it again to go on, with fewer workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@functools.cache
def _tokenizer(name: str) -> Tokenizer:
    return load_tokenizer(name, "tokenizer")


def _end_with_parent() -> None:
    """A worker's start: it ends when its parent is killed, and leaves the other cores to the other workers."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
