"""One dataset on disk: PREFIX.bin and PREFIX.idx, in Megatron's formats, and our PREFIX.json beside them."""

import json
import os
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from s2train.errors import ConfigError

# An .idx, little-endian, as megatron/core/datasets/indexed_dataset.py writes it: magic, version, dtype code,
# number of sequences, number of document ends; then lengths (int32), byte offsets and document ends (int64).
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_AGAIN = "Prepare the data again, with launch/prepare_data.py and overwrite=true"
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
    """The sidecar PREFIX.json: how a dataset was made. Older ones lack what has a default."""

    tokenizer: str  # as `load_tokenizer` takes it
    fingerprint: str  # of the tokenizer
    vocab_size: int
    documents: int
    tokens: int
    unigram_entropy: float  # nats per token
    sources: dict[str, str]  # file -> sha256
    end_token: str | None = None  # None: bytes, which have none, or not told
    formats: dict[str, int] = field(default_factory=dict)  # format -> files
    document_chars: int | None = None  # text files were cut into documents of so many characters or more
    files_cut: int = 0
    documents_cut: int = 0  # of these files
    blank_rows: int = 0  # left out
    replaced_surrogates: int = 0  # by U+FFFD
    files_without_text: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_metadata(prefix: str) -> Metadata | None:
    """The sidecar of `prefix`; None where there is none, as for datasets that other tools made."""
    path = Path(f"{prefix}.json")
    if not path.is_file():
        return None
    try:
        return Metadata(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        problem = f"its sidecar {path} can't be read ({error})"
        raise ConfigError("data.path", prefix, problem, "Prepare the data again, with overwrite=true") from error


def read_document_lengths(prefix: str) -> npt.NDArray[np.int32]:
    """Tokens of each sequence (for our files: document), int32 [documents], once both files are found sound.

    Raises ConfigError, on `data.path`, when a file is missing, empty or cut off, or the two differ in size.
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
            raise ConfigError("data.path", prefix, f"{prefix}.idx is cut off", _AGAIN)
        lengths = np.fromfile(file, dtype="<i4", count=sequences)
    expected = int(lengths.sum(dtype=np.int64)) * np.dtype(dtype).itemsize
    if expected == 0:
        raise ConfigError("data.path", prefix, "holds no tokens", "Prepare it from files that hold text")
    if (found := os.path.getsize(f"{prefix}.bin")) != expected:
        problem = f"{prefix}.bin has {found:,} bytes where its .idx tells of {expected:,}"
        raise ConfigError("data.path", prefix, problem, _AGAIN)
    return lengths


def read_ends(prefix: str, count: int) -> list[npt.NDArray[np.integer]]:
    """The first and the last `count` tokens, or as many as there are, of data that `read_document_lengths` passed."""
    dtype, _, _ = _read_header(prefix)
    tokens = np.memmap(f"{prefix}.bin", dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
    return [tokens[:count], tokens[-count:]]


def _read_header(prefix: str) -> tuple[type[np.number], int, int]:
    """Type of a token, number of sequences, number of document ends."""
    with open(f"{prefix}.idx", "rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise ConfigError("data.path", prefix, f"{prefix}.idx is empty or cut off", _AGAIN)
    magic, version, code, sequences, document_ends = _HEADER.unpack(header)
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise ConfigError("data.path", prefix, f"{prefix}.idx is no index of Megatron's", _AGAIN)
    return _DTYPES[code], sequences, document_ends
