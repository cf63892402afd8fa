"""Text to token ids and back: bytes, or any `tokenizer.json` of Hugging Face's tokenizers."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import tokenizers as hf

from s2train.errors import ConfigError

END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "</s>", "<eod>", "<|end_of_text|>")
SMALLEST_BPE = 257  # ids: the bytes and the end of document


class Tokenizer(Protocol):
    """What the rest of s2train, and Megatron's datasets, ask of a tokenizer.

    Megatron reads `vocab_size`, `eod` and `unique_identifiers`, and takes a missing `pad` to mean none.
    """

    @property
    def name(self) -> str:
        """As `load_tokenizer` takes it."""

    @property
    def fingerprint(self) -> str:
        """Equal for two tokenizers exactly when they give the same ids."""

    @property
    def vocab_size(self) -> int:
        """Ids are 0 … vocab_size − 1."""

    @property
    def eod(self) -> int:
        """Id put after each document; no text encodes to it."""

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """What Megatron writes into the key of its index caches."""

    def encode(self, text: str) -> list[int]: ...

    def encode_many(self, texts: list[str]) -> list[npt.NDArray[np.integer]]:
        """Ids [n] of each text, the same as `encode`'s, in less time."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, without the ends of documents; broken UTF-8 becomes U+FFFD."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0 … 255, and 256 as end of document."""

    name = "bytes"
    fingerprint = "bytes"
    vocab_size = 257
    eod = 256

    @property
    def unique_identifiers(self) -> dict[str, str]:
        return {"fingerprint": self.fingerprint}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_many(self, texts: list[str]) -> list[npt.NDArray[np.integer]]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i != self.eod).decode(errors="replace")


class FileTokenizer:
    """A `tokenizer.json`; special tokens written out in a text are encoded as plain text.

    Raises ValueError for a file that is no tokenizer or that names no end of document.
    """

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        try:
            self._tokenizer = hf.Tokenizer.from_buffer(content)
        except Exception as error:  # the Rust side raises nothing narrower
            raise ValueError(f"is no tokenizer.json of Hugging Face's tokenizers ({error})") from error
        self._tokenizer.encode_special_tokens = True
        # A file keeps both as its last user set them: documents would be cut, or filled up.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        ends = [name for name in END_OF_DOCUMENT_NAMES if name in ids]
        if not ends:
            raise ValueError(f"has no end-of-document token, none of {', '.join(END_OF_DOCUMENT_NAMES)}")
        self.name = str(path)
        self.fingerprint = f"sha256:{hashlib.sha256(content).hexdigest()}"
        self.vocab_size: int = max(ids.values()) + 1  # ids may have gaps
        self.eod: int = ids[ends[0]]

    @property
    def unique_identifiers(self) -> dict[str, str]:
        return {"fingerprint": self.fingerprint}

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: list[str]) -> list[npt.NDArray[np.integer]]:
        # without offsets into the texts, which nobody asks for
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(e.ids, dtype=np.int64) for e in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([i for i in ids if i != self.eod], skip_special_tokens=False))


def load_tokenizer(name: str, setting: str = "data.tokenizer") -> Tokenizer:
    """The tokenizer called `name`: `bytes`, or the path of a `tokenizer.json`.

    Raises ConfigError, on `setting`, when there is no such file or it can't be used.
    """
    if name == "bytes":
        return ByteTokenizer()
    remedy = "Set `bytes` or a tokenizer.json; launch/prepare_data.py makes one with tokenizer=bpe:4096"
    if not Path(name).is_file():
        raise ConfigError(setting, name, "no such file", remedy)
    try:
        return FileTokenizer(Path(name))
    except ValueError as error:
        raise ConfigError(setting, name, str(error), remedy) from error


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE on `texts` and save it as `path`; its end of document is <|endoftext|>.

    Args:
        vocab_size: at most this many ids, `SMALLEST_BPE` at least.
    Raises:
        ValueError: it is below that.
    """
    if vocab_size < SMALLEST_BPE:
        raise ValueError(f"a byte-level BPE needs {SMALLEST_BPE} ids at least, not {vocab_size}")
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT_NAMES[0]],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.save(str(path))
