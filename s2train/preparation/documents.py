"""Reads the documents of a file."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from s2train.errors import ConfigError
from s2train.preparation.sources import BadDocumentError, Source, read_pieces

_OR_FORMAT = re.compile("[,;] or set format=")


def read_documents(
    source: Source, text_key: str = "text", on_position: Callable[[int], None] | None = None
) -> Iterator[str]:
    """Read the documents of a UTF-8 file in order.

    Omits documents without text. JSON lines hold one document per line, under `text_key`; a table holds one per
    row. Plain text is one document, or is cut by `split_documents`; its line ends are read as "\\n".

    Args:
        on_position: called occasionally with the number of bytes of the file read so far.

    Raises:
        ConfigError: on `input`; the file is not UTF-8, or a line is not such JSON.
    """
    for piece in read_pieces(source, 0, text_key):
        if on_position is not None:
            on_position(piece.position)
        try:
            yield from piece.documents(text_key).texts
        except BadDocumentError as error:
            raise bad_document(source.path, error) from error


def documents_of(setting: str, value: object, path: Path, text_key: str, *, keep_line_end: bool = True) -> list[str]:
    """Read all documents of a file that another setting than `input` names.

    Args:
        keep_line_end: keep the line end that ends a plain text.

    Raises:
        ConfigError: on `text_key` or on `setting`, as `read_documents`.
    """
    try:
        source = Source.of(path)
        texts = list(read_documents(source, text_key))
    except ConfigError as error:
        if error.setting == "text_key":
            raise
        remedy = _OR_FORMAT.split(error.remedy)[0]  # a setting of launch/prepare_data.py alone
        raise ConfigError(setting, value, error.problem, remedy) from error
    if keep_line_end or source.format.kind != "text":
        return texts
    return [text.removesuffix("\n") for text in texts]


def bad_document(path: Path, error: BadDocumentError) -> ConfigError:
    """Make the error for a document of `path` that can't be read."""
    return ConfigError("input", path, error.problem, error.remedy)
