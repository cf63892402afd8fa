"""Encodes text as bytes or with any Hugging Face `tokenizer.json`."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import tokenizers as hf

from s2train.data.long_texts import SEGMENT, encode_long
from s2train.errors import ConfigError

# Default end tokens: without a setting, the first of these that a tokenizer has.
END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "</s>", "<eod>", "<|end_of_text|>", "<eos>")
SMALLEST_BPE = 257  # ids: one for each byte, and the end of document
LARGEST_BPE = 1 << 20  # its trainer reserves memory for all ids, and aborts the process if there is too little


Offsets = list[tuple[int, int]]  # first character of each token in a text, and one past its last


class Tokenizer(Protocol):
    """Interface of a tokenizer for s2train and Megatron's datasets.

    Megatron reads `vocab_size`, `eod` and `unique_identifiers`; without `pad` it assumes that there is no such token.
    """

    @property
    def name(self) -> str:
        """Name that `load_tokenizer` accepts."""

    @property
    def fingerprint(self) -> str:
        """Equal exactly for tokenizers that give the same ids."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, which are 0 … vocab_size − 1."""

    @property
    def eod(self) -> int:
        """Id appended to each document.

        No text may encode to it, which is checked while data are prepared.
        """

    @property
    def end_token(self) -> str | None:
        """Name of the token `eod`; None if it has none."""

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """Entries for the key of Megatron's index caches."""

    def encode(self, text: str) -> list[int]: ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """Encode a text, and give the characters of each id.

        A token that is part of a character has the whole character.
        """

    def encode_many(self, texts: list[str]) -> list[npt.NDArray[np.integer]]:
        """Encode many texts, faster than by `encode`; ids [n] of each."""

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids, leaving out ends of documents; invalid UTF-8 becomes U+FFFD."""


class ByteTokenizer:
    """Encodes UTF-8 bytes as ids 0 … 255.

    The end of document is 256.
    """

    name = "bytes"
    fingerprint = "bytes"
    vocab_size = 257
    eod = 256
    end_token = None

    @property
    def unique_identifiers(self) -> dict[str, str]:
        return {"fingerprint": self.fingerprint}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        if text.isascii():
            return self.encode(text), list(zip(range(len(text)), range(1, len(text) + 1), strict=True))
        return self.encode(text), [(i, i + 1) for i, character in enumerate(text) for _ in character.encode()]

    def encode_many(self, texts: list[str]) -> list[npt.NDArray[np.integer]]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        # A model's vocabulary may be larger: its other ids decode to nothing, as those of a tokenizer.json.
        return bytes(i for i in ids if i < self.eod).decode(errors="replace")


class FileTokenizer:
    """A tokenizer from a `tokenizer.json`.

    Special tokens and the end token are encoded as plain text if a text spells them out.

    Args:
        end_token: token that ends documents; None takes the first of `END_OF_DOCUMENT_NAMES` that the file has.

    Raises:
        ValueError: the file is not a tokenizer.
        EndTokenError: the tokenizer has no such token, or none of the default ones.
    """

    def __init__(self, path: Path, end_token: str | None = None) -> None:
        content = path.read_bytes()
        try:
            self._tokenizer = hf.Tokenizer.from_buffer(content)
        except Exception as error:  # the Rust library raises nothing more specific
            raise ValueError(f"is not a Hugging Face tokenizer.json ({error})") from error
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.default_end = next((name for name in END_OF_DOCUMENT_NAMES if name in ids), None)
        end = end_token or self.default_end
        if end not in ids:
            raise EndTokenError([token.content for token in self._tokenizer.get_added_tokens_decoder().values()])
        # If the file declares its end token as an added token that isn't special, a text could encode to it.
        added = {token.content: token for token in self._tokenizer.get_added_tokens_decoder().values()}
        if end in added and not added[end].special:
            self._tokenizer.add_special_tokens([hf.AddedToken(end, special=True, normalized=False)])
        self._tokenizer.encode_special_tokens = True
        # A file saves both as last set by its user: documents would be truncated or padded.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.name = str(path)
        self.fingerprint = _fingerprint(content)
        self.vocab_size: int = max(ids.values()) + 1  # ids may have gaps
        self.end_token: str | None = end
        self.eod: int = ids[end]

    @property
    def unique_identifiers(self) -> dict[str, str]:
        return {"fingerprint": self.fingerprint}

    def encode(self, text: str) -> list[int]:
        if len(text) > SEGMENT:
            return encode_long(self._tokenizer, text).tolist()
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return list(encoded.ids), list(encoded.offsets)

    def encode_many(self, texts: list[str]) -> list[npt.NDArray[np.integer]]:
        # the fast method omits offsets, which are not needed
        short = [text for text in texts if len(text) <= SEGMENT]
        encoded = iter(self._tokenizer.encode_batch_fast(short, add_special_tokens=False))
        return [
            encode_long(self._tokenizer, text) if len(text) > SEGMENT else np.array(next(encoded).ids, dtype=np.int64)
            for text in texts
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([i for i in ids if i != self.eod], skip_special_tokens=False))


class EndTokenError(ValueError):
    """Raised if a tokenizer lacks the end token.

    Args:
        names: names of its added tokens.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        super().__init__(names)


def load_tokenizer(name: str, setting: str = "data.tokenizer", end_token: str | None = None) -> Tokenizer:
    """Load the tokenizer called `name`: `bytes`, or the path of a `tokenizer.json`.

    Args:
        setting: setting to name in an error.
        end_token: token that ends documents; None takes the default one.

    Raises:
        ConfigError: on `setting`: there is no such file, or it can't be used. On the setting of the end token, which is
            `setting` with another last word: the tokenizer has no such token.
    """
    end_setting = setting.removesuffix("tokenizer") + "end_token"
    if name == "bytes":
        if end_token is not None:
            problem = f"byte tokens have no names; documents end with the id {ByteTokenizer.eod}"
            raise ConfigError(end_setting, end_token, problem, "Leave it unset, or set a tokenizer.json")
        return ByteTokenizer()
    remedy = "Set `bytes` or a tokenizer.json; launch/prepare_data.py makes one with tokenizer=bpe:4096"
    if not Path(name).is_file():
        raise ConfigError(setting, name, "no such file", remedy)
    try:
        return FileTokenizer(Path(name), end_token)
    except EndTokenError as error:
        listed = f"It has {', '.join(error.names[:8])}{', …' if len(error.names) > 8 else ''}. " if error.names else ""
        example = next((name for name in error.names if "end" in name or "eos" in name), (*error.names, "TOKEN")[0])
        remedy = f"{listed}Set one: '{end_setting}=\"{example}\"', in both quotes"
        if end_token is not None:
            raise ConfigError(end_setting, end_token, f"{name} has no such token", remedy) from error
        problem = f"has no end-of-document token (none of {', '.join(END_OF_DOCUMENT_NAMES)})"
        raise ConfigError(setting, name, problem, remedy) from error
    except ValueError as error:
        raise ConfigError(setting, name, str(error), remedy) from error


def fingerprint(name: str) -> str | None:
    """Compute the fingerprint of a tokenizer without loading it.

    Returns None if there is no such file.
    """
    if name == "bytes":
        return ByteTokenizer.fingerprint
    return _fingerprint(Path(name).read_bytes()) if Path(name).is_file() else None


def _fingerprint(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path, end_token: str | None = None) -> None:
    """Train a byte-level BPE on `texts` and save it as `path`.

    Args:
        vocab_size: number of ids, `SMALLEST_BPE` or more; texts with too few pairs to merge give fewer.
        end_token: token that ends documents; None: <|endoftext|>.
    Raises:
        ValueError: `vocab_size` is below `SMALLEST_BPE`.
    """
    if vocab_size < SMALLEST_BPE:
        raise ValueError(f"a byte-level BPE needs at least {SMALLEST_BPE} ids, not {vocab_size}")
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_token or END_OF_DOCUMENT_NAMES[0]],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.save(str(path))
