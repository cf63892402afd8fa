"""Reads a dataset on disk.

Megatron's PREFIX.bin and PREFIX.idx, and our sidecar PREFIX.json.
"""

import json
import os
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from s2train.errors import ConfigError

# An .idx file, little-endian, as megatron/core/datasets/indexed_dataset.py writes it: magic, version, dtype code,
# number of sequences, number of document ends; then lengths (int32), byte offsets and document ends (int64).
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_PREPARE_AGAIN = "Prepare the data again, with launch/prepare_data.py and overwrite=true"
_END = 1_000_000  # tokens at each end that are checked
_DTYPES: dict[int, type[np.number]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}


@dataclass(frozen=True)
class Metadata:
    """The sidecar PREFIX.json, which records how a dataset was made.

    Older sidecars lack the fields that have defaults.
    """

    tokenizer: str  # name that `load_tokenizer` accepts
    fingerprint: str  # fingerprint of the tokenizer
    vocab_size: int
    documents: int
    tokens: int
    unigram_entropy: float  # nats per token
    sources: dict[str, str]  # file -> sha256
    end_token: str | None = None  # None: bytes, which have none, or not recorded
    formats: dict[str, int] = field(default_factory=dict)  # format -> files
    document_chars: int | None = None  # minimum characters of the documents that text files were cut into
    files_cut: int = 0
    documents_cut: int = 0  # documents cut from these files
    blank_rows: int = 0  # rows left out because they hold no text
    replaced_surrogates: int = 0  # lone surrogates replaced by U+FFFD
    files_without_text: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_metadata(prefix: str) -> Metadata | None:
    """Read the sidecar of `prefix`, or None without one.

    Datasets of other tools have none.
    """
    path = Path(f"{prefix}.json")
    if not path.is_file():
        return None
    try:
        return Metadata(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        problem = f"its sidecar {path} can't be read ({error})"
        raise ConfigError("data.path", prefix, problem, "Prepare the data again, with overwrite=true") from error


def read_document_lengths(prefix: str) -> npt.NDArray[np.int32]:
    """Read the tokens of each sequence: int32 [documents].

    Checks both files. In our datasets a sequence is a document.

    Raises:
        ConfigError: on `data.path`; a file is missing, empty or truncated, or the sizes of the two disagree.
    """
    for suffix in (".idx", ".bin"):
        if not os.path.isfile(prefix + suffix):
            whole = prefix.endswith((".bin", ".idx")) and os.path.isfile(prefix)
            problem = "is a file, not the prefix of a .bin and .idx pair" if whole else f"{prefix}{suffix} is missing"
            remedy = f"Set {prefix[:-4]}" if whole else "Set a prefix made by launch/prepare_data.py, or `bundled`"
            raise ConfigError("data.path", prefix, problem, remedy)
    dtype, sequences, document_ends = _read_header(prefix)
    index_bytes = os.path.getsize(f"{prefix}.idx")
    with open(f"{prefix}.idx", "rb") as file:
        file.seek(_HEADER.size)
        if index_bytes < _HEADER.size + 12 * sequences + 8 * document_ends:
            raise ConfigError("data.path", prefix, f"{prefix}.idx is truncated", _PREPARE_AGAIN)
        lengths = np.fromfile(file, dtype="<i4", count=sequences)
    expected = int(lengths.sum(dtype=np.int64)) * np.dtype(dtype).itemsize
    if expected == 0:
        raise ConfigError("data.path", prefix, "holds no tokens", "Prepare it from files that hold text")
    if (found := os.path.getsize(f"{prefix}.bin")) != expected:
        problem = f"{prefix}.bin has {found:,} bytes, but its .idx describes {expected:,}"
        raise ConfigError("data.path", prefix, problem, _PREPARE_AGAIN)
    return lengths


def read_ends(prefix: str) -> list[npt.NDArray[np.integer]]:
    """Read the first and the last million tokens of data.

    Reads all tokens if there are fewer. Call `read_document_lengths` first, which checks the files.
    """
    dtype, _, _ = _read_header(prefix)
    tokens = np.memmap(f"{prefix}.bin", dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
    return [tokens[:_END], tokens[-_END:]]


def _read_header(prefix: str) -> tuple[type[np.number], int, int]:
    """Read the header of an .idx file.

    Returns the token dtype, the number of sequences and the number of document ends.
    """
    with open(f"{prefix}.idx", "rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise ConfigError("data.path", prefix, f"{prefix}.idx is empty or truncated", _PREPARE_AGAIN)
    magic, version, code, sequences, document_ends = _HEADER.unpack(header)
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise ConfigError("data.path", prefix, f"{prefix}.idx is not a Megatron index", _PREPARE_AGAIN)
    return _DTYPES[code], sequences, document_ends
