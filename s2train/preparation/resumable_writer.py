"""Tokenized documents on disk, in the order of the input, such that work goes on after a kill."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from s2train.files import replacing
from s2train.preparation.tokenizing import Encoded

JOURNAL_SECONDS = 5.0  # between two commits; what comes after the last is tokenized again


@dataclass(frozen=True)
class Done:
    """What is safely on disk.

    Attributes:
        pieces, documents, tokens, text_bytes: how many.
        sources_with_text: numbers of sources.
        blank, replaced: rows left out and half surrogate pairs, see `s2train.preparation.sources.Documents`.
        complete: all of the input.
    """

    pieces: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    sources_with_text: list[int] = field(default_factory=list)
    blank: int = 0
    replaced: int = 0
    complete: bool = False


class Spool:
    """Two files that grow, `tokens` and `documents` (int64 [n, 2]: length and source), and a journal of what counts.

    The journal is replaced once what it tells of is on disk. What lies beyond it is cut off on opening.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        self._folder, self._dtype = folder, np.dtype(dtype)
        self._committed = time.monotonic()
        journal = folder / "journal.json"
        self.done = Done(**json.loads(journal.read_text())) if journal.is_file() else Done()

    @contextmanager
    def writing(self) -> Iterator["Spool"]:
        """Open to `add`; what was added is committed at the end, an error's too, as far as the disk takes it."""
        sizes = {"tokens": self.done.tokens * self._dtype.itemsize, "documents": self.done.documents * 16}
        self._files: list[IO[bytes]] = []
        for name, size in sizes.items():
            path = self._folder / name
            path.touch()
            os.truncate(path, size)
            self._files.append(path.open("ab"))
        try:
            yield self
        finally:
            self._commit()
            for file in self._files:
                file.close()

    def add(self, piece: Encoded) -> None:
        """Append a piece."""
        tokens, documents = self._files
        tokens.write(piece.tokens.tobytes())
        documents.write(np.stack([piece.lengths, np.full_like(piece.lengths, piece.source)], axis=1).tobytes())
        done = self.done
        is_new = len(piece.lengths) > 0 and piece.source not in done.sources_with_text[-1:]
        self.done = Done(  # in one go, whatever interrupts this
            pieces=done.pieces + 1,
            documents=done.documents + len(piece.lengths),
            tokens=done.tokens + len(piece.tokens),
            text_bytes=done.text_bytes + piece.text_bytes,
            sources_with_text=[*done.sources_with_text, piece.source] if is_new else done.sources_with_text,
            blank=done.blank + piece.blank,
            replaced=done.replaced + piece.replaced,
        )
        if time.monotonic() - self._committed >= JOURNAL_SECONDS:
            self._commit()

    def finish(self) -> None:
        """Note that nothing is missing."""
        self.done = replace(self.done, complete=True)

    def read(self) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Tokens, and of each document its length and its source."""
        if not self.done.documents:
            return np.empty(0, self._dtype), np.empty(0, np.int64), np.empty(0, np.int64)
        documents = np.fromfile(self._folder / "documents", dtype=np.int64).reshape(-1, 2)
        tokens = np.memmap(self._folder / "tokens", dtype=self._dtype, mode="r")
        return tokens, documents[:, 0].copy(), documents[:, 1].copy()

    def _commit(self) -> None:
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        with replacing(self._folder / "journal.json") as path:
            path.write_text(json.dumps(asdict(self.done)))
        self._committed = time.monotonic()


def open_folder(folder: Path, key: str) -> bool:
    """Make `folder` ready for work of this `key`; what is there of other work is deleted. Whether work goes on."""
    path = folder / "key"
    if path.is_file() and path.read_text() == key:
        return True
    for old in folder.iterdir():
        if old.name != "lock":
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    with replacing(path) as temporary:
        temporary.write_text(key)
    return False
