"""Documents of one file after the other."""

from collections.abc import Callable, Iterator
from pathlib import Path

from s2train.errors import ConfigError
from s2train.preparation.sources import BadDocumentError, Source, read_pieces


def read_documents(
    source: Source, text_key: str = "text", on_position: Callable[[int], None] | None = None
) -> Iterator[str]:
    """Documents of a UTF-8 file, in order; those without text are left out.

    JSON lines hold one document a line, under `text_key`, a table one a row. Plain text is one document, or cut
    into some by `split_documents`; its line ends are read as "\\n".

    Args:
        on_position: called now and then with the bytes of the file that were read so far.

    Raises ConfigError, on `input`, for a file that holds no UTF-8, or no such JSON.
    """
    for piece in read_pieces(source, 0, text_key):
        if on_position is not None:
            on_position(piece.position)
        try:
            yield from piece.documents(text_key).texts
        except BadDocumentError as error:
            raise bad_document(source.path, error) from error


def bad_document(path: Path, error: BadDocumentError) -> ConfigError:
    """For a document of `path` that can't be read."""
    return ConfigError("input", path, error.problem, error.remedy)
