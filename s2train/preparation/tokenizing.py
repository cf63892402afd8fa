"""Tokenizes pieces of text in several processes."""

import functools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from s2train.data.tokenizers import Tokenizer, load_tokenizer
from s2train.distributed.worker_pool import TOKENIZERS_PARALLELISM, worker_pool
from s2train.preparation.sources import BadDocumentError, Piece

_PIECES_AHEAD = 4  # pieces in flight per worker
_CHARS_AHEAD = 1 << 30  # characters in flight, since a piece may be a whole file
# Characters of a document that a worker tokenizes on several threads. On one, the largest document of Linux kept a
# single core busy for 100 of 163 s (launch/results/2026-11-28-h200-quality-data.json).
THREADED_CHARS = 8 << 20
_MAX_TOKENS = 2**31 - 1  # tokens of a document in a Megatron index


@dataclass(frozen=True)
class Encoding:
    """How pieces are tokenized.

    Attributes:
        tokenizer: name that `load_tokenizer` accepts.
        dtype: NumPy name of the ids' dtype.
        text_key: see `Piece.documents`.
        end_token: end token for `load_tokenizer`.
    """

    tokenizer: str
    dtype: str
    text_key: str
    end_token: str | None = None


@dataclass(frozen=True)
class Encoded:
    """A tokenized piece.

    Attributes:
        source, position: those of the piece.
        lengths: tokens of each document, including its end, int64 [n].
        tokens: tokens of all documents, concatenated.
        text_bytes: UTF-8 bytes of the documents.
        blank, replaced: see `Documents`.
    """

    source: int
    position: int
    lengths: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.integer]
    text_bytes: int
    blank: int
    replaced: int


def encode(piece: Piece, encoding: Encoding) -> Encoded:
    """Tokenize a piece in this process.

    Raises:
        BadDocumentError: a document can't be read, is too long, or its text holds the end token.
    """
    tokenizer = _tokenizer(encoding.tokenizer, encoding.end_token)
    documents = piece.documents(encoding.text_key)
    texts = documents.texts
    with _threads(texts):
        encoded = tokenizer.encode_many(texts)
    for number, text, ids in zip(documents.numbers, texts, encoded, strict=True):
        if (ids == tokenizer.eod).any():
            raise BadDocumentError(
                f"the text of {piece.unit} {number} holds the end token {tokenizer.end_token} (id {tokenizer.eod})"
                f"{_surroundings(text, tokenizer.end_token)}, which would end the document there",
                piece.source,
                "Remove it from the text, or set end_token to one that no text holds",
            )
        if len(ids) >= _MAX_TOKENS:
            problem = f"{piece.unit} {number} has {len(ids):,} tokens, more than an index allows for a document"
            raise BadDocumentError(problem, piece.source, "Cut it: set document_chars for a text file")
    ends = np.array([tokenizer.eod])
    parts = [part for ids in encoded for part in (ids, ends)]
    tokens = np.concatenate(parts).astype(encoding.dtype) if parts else np.empty(0, encoding.dtype)
    lengths = np.array([len(ids) + 1 for ids in encoded], dtype=np.int64)
    text_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
    return Encoded(piece.source, piece.position, lengths, tokens, text_bytes, documents.blank, documents.replaced)


@contextmanager
def _threads(texts: Sequence[str]) -> Iterator[None]:
    """Let a worker tokenize on several threads, if a text is long."""
    if os.environ.get(TOKENIZERS_PARALLELISM) != "false" or max(map(len, texts), default=0) < THREADED_CHARS:
        yield
        return
    os.environ[TOKENIZERS_PARALLELISM] = "true"
    try:
        yield
    finally:
        os.environ[TOKENIZERS_PARALLELISM] = "false"


def _surroundings(text: str, word: str | None) -> str:
    """Quote a word in a text with the characters around it."""
    at = text.find(word) if word else -1
    return f" in {text[max(0, at - 20) : at + len(word or '') + 20]!r}" if at >= 0 else ""


def encode_all(pieces: Iterable[Piece], encoding: Encoding, workers: int) -> Iterator[Encoded]:
    """Tokenize pieces in order, in `workers` processes (one: in this process).

    Raises:
        BadDocumentError: a piece can't be read.
        TrainingError: a worker was killed.
    """
    if workers == 1:
        yield from (encode(piece, encoding) for piece in pieces)
        return
    with worker_pool(workers) as pool:
        waiting: deque[tuple[int, Future[Encoded]]] = deque()
        size = 0
        for piece in pieces:
            chars = len(piece.texts) if isinstance(piece.texts, bytes) else sum(map(len, piece.texts))
            waiting.append((chars, pool.submit(encode, piece, encoding)))
            size += chars
            while len(waiting) >= _PIECES_AHEAD * workers or (waiting and size > _CHARS_AHEAD):
                chars, first = waiting.popleft()
                size -= chars
                yield first.result()
        for _, encoded in waiting:
            yield encoded.result()


@functools.cache
def _tokenizer(name: str, end_token: str | None) -> Tokenizer:
    return load_tokenizer(name, "tokenizer", end_token)
