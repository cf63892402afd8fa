"""Documents of one file after the other."""

from collections.abc import Callable, Iterator
from pathlib import Path

from s2train.data.sources import BadDocumentError, read_pieces
from s2train.errors import ConfigError


def read_documents(
    path: Path, document_chars: int, text_key: str = "text", told: Callable[[int], None] | None = None
) -> Iterator[str]:
    """Documents of a UTF-8 file, in order; empty ones are left out.

    A `.jsonl` file holds one document a line, under `text_key`, a `.parquet` file one a row. Any other file is plain
    text, cut into documents by `split_documents`; its line ends are read as "\\n". Text and `.jsonl` may be
    compressed, as `.gz` or `.zst`.

    Args:
        told: called now and then with the bytes of the file that were read so far.

    Raises ConfigError, on `input`, for a file that holds no text, no UTF-8, or no such JSON.
    """
    empty = True
    for piece in read_pieces(path, 0, document_chars, text_key):
        if told is not None:
            told(piece.position)
        try:
            for document in piece.documents(text_key):
                empty = empty and document.isspace()
                yield document
        except BadDocumentError as error:
            raise bad_document(path, error) from error
    if empty:
        raise no_text(path)


def bad_document(path: Path, error: BadDocumentError) -> ConfigError:
    """For a document of `path` that can't be read."""
    return ConfigError("input", path, error.problem, error.remedy)


def no_text(path: Path) -> ConfigError:
    """For a file without any."""
    return ConfigError("input", path, "holds no text", "Leave it out, or give another file")
