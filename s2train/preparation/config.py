"""Settings of `launch/prepare_data.py` and `launch/make_corpus.py`."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from s2train import config
from s2train.needles.config import NeedleDocumentsConfig

SOURCE_FILES = (
    ".c", ".h", ".S", ".rs", ".py", ".pl", ".sh", ".rst", ".txt", ".yaml", ".dts", ".dtsi", "Makefile", "Kconfig",
)  # fmt: skip


@dataclass
class PrepareConfig:
    """A run of `launch/prepare_data.py`."""

    # a file or [file, …], with * as wildcard: text or JSON lines, also compressed as .gz, .zst, .bz2 or .xz, or
    # .parquet; "bundled": the corpus shipped with s2train; "needles": documents generated as set by `needles`
    input: Any = MISSING
    output: str = MISSING  # prefix of the .bin, .idx and .json files to write
    tokenizer: str = "bytes"  # bytes, a tokenizer.json, or bpe:SIZE to train one, saved as OUTPUT-tokenizer.json
    # token of a tokenizer.json to append to each document; no text may encode to it. None: the first of <|endoftext|>,
    # </s>, <eod>, <|end_of_text|> and <eos> that the tokenizer has. Write 'end_token="<eos>"', with both quotes
    end_token: str | None = None
    format: str = "auto"  # format of all input: text, jsonl, parquet; auto: by each file's content and name
    text_key: str = "text"  # JSON key or .parquet column that holds the documents
    # cut each text file into documents of at least this many characters, shuffled like others; None: one document per
    # file (the bundled corpus is cut at 10,000)
    document_chars: int | None = None
    # characters of text to train a bpe on, about, taken evenly from all documents; fewer if there are fewer
    tokenizer_chars: int = 200_000_000
    seed: int = 1234  # seed of the order of documents
    workers: int | None = None  # processes that tokenize; None: one per core, fewer for small input or bytes
    overwrite: bool = False
    needles: NeedleDocumentsConfig = field(default_factory=NeedleDocumentsConfig)  # documents of input=needles


@dataclass
class CorpusConfig:
    """A run of `launch/make_corpus.py`."""

    tree: str = MISSING  # folder of source files
    output: str = MISSING  # folder for train.jsonl, held-out.jsonl and corpus.json
    # suffixes or full names of the files to read
    suffixes: list[str] = field(default_factory=lambda: list(SOURCE_FILES))
    depth: int = 2  # levels of folders that name a subsystem: 2 for fs/ext4
    held_out: list[str] = field(default_factory=list)  # subsystems; empty: chosen by a hash of their names
    held_out_share: float = 0.02  # share of all characters to hold out if `held_out` is empty
    duplicate_share: float = 0.8  # drop a file if this share of its lines, in groups of five, was seen before
    seed: int = 1234  # seed of the choice of held-out subsystems
    workers: int | None = None  # processes that read files; None: one per core
    overwrite: bool = False


def register() -> None:
    """Register these schemas with Hydra."""
    config.register({"prepare": PrepareConfig, "corpus": CorpusConfig})
