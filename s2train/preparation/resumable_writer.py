"""Writes tokenized documents to disk so that a killed process can resume."""

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

JOURNAL_SECONDS = 5.0  # between two commits; pieces after the last commit are tokenized again


@dataclass(frozen=True)
class Done:
    """What has been written.

    Attributes:
        pieces, documents, tokens, text_bytes: their numbers.
        sources_with_text: numbers of the sources that hold text.
        blank, replaced: rows left out and lone surrogates, see `s2train.preparation.sources.Documents`.
        complete: whether all of the input is written.
    """

    pieces: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    sources_with_text: list[int] = field(default_factory=list)
    blank: int = 0
    replaced: int = 0
    complete: bool = False


class ResumableWriter:
    """Appends to two files, with a journal.

    The files are `tokens` and `documents` (int64 [n, 2]: length and source). The journal is replaced after the data
    that it covers are on disk. Data beyond the journal are truncated on opening.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        self._folder, self._dtype = folder, np.dtype(dtype)
        self._committed = time.monotonic()
        journal = folder / "journal.json"
        self.done = Done(**json.loads(journal.read_text())) if journal.is_file() else Done()

    @contextmanager
    def writing(self) -> Iterator["ResumableWriter"]:
        """Open for `add`; commits at the end, also after an error."""
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
        self.done = Done(  # one assignment, so that an interrupt leaves it consistent
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
        """Mark the input as complete."""
        self.done = replace(self.done, complete=True)

    def read(self) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Read all tokens, and the length and the source of each document."""
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
    """Prepare `folder` for work with this `key`.

    Returns whether it resumes earlier work. Deletes files of work with another key.
    """
    path = folder / "key"
    if path.is_file() and path.read_text() == key:
        return True
    for old in folder.iterdir():
        if old.name != "lock":
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    with replacing(path) as temporary:
        temporary.write_text(key)
    return False
