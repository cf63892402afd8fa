"""Text files, or documents made for needle retrieval, to Megatron indexed datasets."""

import hashlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from s2train.config import PrepareConfig
from s2train.data.blend import BUNDLED
from s2train.data.bundled import bundled_corpus_files, count_ids, unigram_entropy
from s2train.data.documents import read_documents
from s2train.data.indexed import Metadata
from s2train.data.needle_documents import needle_documents, needle_texts
from s2train.data.tokenizers import SMALLEST_BPE, Tokenizer, load_tokenizer, train_bpe
from s2train.errors import ConfigError

NEEDLES = "needles"
_COLUMNS: tuple[ProgressColumn, ...] = (TextColumn("{task.description}"), BarColumn())


def prepare(cfg: PrepareConfig) -> Metadata:
    """Write OUTPUT.bin, OUTPUT.idx and the sidecar OUTPUT.json; same input and settings, same bytes.

    Documents end with the tokenizer's end of document. They are shuffled such that each source is spread
    evenly, so that a held-out part, which Megatron takes from the end, holds its share of every source.

    Files are written under temporary names and renamed when complete, the .idx last: where there is an .idx,
    the rest is whole.

    Raises ConfigError for input that is missing or holds no text, a tokenizer that can't be used, and output
    that exists already, unless `overwrite`.
    """
    sources = _input_files(cfg.input)
    if cfg.document_chars < 1:
        raise ConfigError("document_chars", cfg.document_chars, "is no length", "Set 1 or more, e.g. 10000")
    output = Path(cfg.output)
    if not output.name:
        raise ConfigError("output", cfg.output, "names no file", "Set a prefix, e.g. runs/data/mine")
    names = [".bin", ".json", ".idx"]  # in the order of renaming
    if cfg.tokenizer.startswith("bpe:"):
        names.insert(0, "-tokenizer.json")
    final = {name: output.with_name(output.name + name) for name in names}
    existing = [str(path) for path in final.values() if path.exists()]
    if existing and not cfg.overwrite:
        raise ConfigError("output", cfg.output, f"{', '.join(existing)} exists", "Add overwrite=true, or set another")

    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = {name: output.with_name(f".{output.name}.{os.getpid()}{name}") for name in [*names, ".spool"]}
    try:
        metadata = _write(cfg, sources, temporary, final)
        final[".idx"].unlink(missing_ok=True)  # so that no old index ever stands beside a new .bin
        for name in names:
            temporary[name].replace(final[name])
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return metadata


def _write(cfg: PrepareConfig, sources: list[Path], temporary: dict[str, Path], final: dict[str, Path]) -> Metadata:
    documents = partial(read_documents, document_chars=cfg.document_chars)
    tokenizer_name = cfg.tokenizer
    if "-tokenizer.json" in final:
        tokenizer_name = str(final["-tokenizer.json"])
        texts: Iterator[str] = (document for source in sources for document in documents(source))
        if cfg.input == NEEDLES:
            texts = needle_texts(cfg.needles, cfg.seed)
        train_bpe(texts, _bpe_size(cfg.tokenizer), temporary["-tokenizer.json"])
        tokenizer = load_tokenizer(str(temporary["-tokenizer.json"]), "tokenizer")
    else:
        tokenizer = load_tokenizer(cfg.tokenizer, "tokenizer")

    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(str(temporary[".bin"]), dtype=dtype)
    if cfg.input == NEEDLES:
        made = needle_documents(cfg.needles, tokenizer, cfg.seed)
        columns = (*_COLUMNS, MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            for document in progress.track(made, cfg.needles.documents, description="documents"):
                builder.add_document(document, [len(document)])
        count = cfg.needles.documents
    else:
        lengths, source_of = _spool(sources, documents, tokenizer, temporary[".spool"], dtype)
        spooled = np.memmap(temporary[".spool"], dtype=dtype, mode="r")
        starts = np.cumsum(lengths) - lengths
        for i in spread_order(source_of, cfg.seed):
            builder.add_document(spooled[starts[i] : starts[i] + lengths[i]], [int(lengths[i])])
        count = len(lengths)
    builder.finalize(str(temporary[".idx"]))

    tokens = np.memmap(temporary[".bin"], dtype=dtype, mode="r")
    metadata = Metadata(
        tokenizer=tokenizer_name,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        documents=count,
        tokens=len(tokens),
        unigram_entropy=unigram_entropy(count_ids(tokens, tokenizer.vocab_size)),
        sources={str(source): _sha256(source) for source in sources},
    )
    metadata.write(temporary[".json"])
    return metadata


def _spool(
    sources: list[Path],
    documents: Callable[[Path], Iterator[str]],
    tokenizer: Tokenizer,
    path: Path,
    dtype: type[np.number],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Write the tokens of all documents, in the order of the input; their lengths and sources, int64 [n]."""
    lengths, source_of = [], []
    columns = (*_COLUMNS, TextColumn("{task.percentage:.0f}%"), TimeRemainingColumn())
    with path.open("wb") as file, Progress(*columns) as progress:
        task = progress.add_task("tokenizing", total=sum(source.stat().st_size for source in sources))
        for number, source in enumerate(sources):
            for document in documents(source):
                ids = [*tokenizer.encode(document), tokenizer.eod]
                np.asarray(ids, dtype=dtype).tofile(file)
                lengths.append(len(ids))
                source_of.append(number)
                progress.advance(task, len(document))  # characters for bytes: near enough
            progress.update(task, completed=sum(done.stat().st_size for done in sources[: number + 1]))
    return np.array(lengths, dtype=np.int64), np.array(source_of, dtype=np.int64)


def spread_order(source_of: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """An order of documents, int64 [n], in which every stretch holds each source's share, give or take one.

    Within a source the order is random; the k-th of its n documents is placed at (k + u)/n of the whole, with
    one random u in [0, 1) a source, so that many sources of few documents mix as well.

    Args:
        source_of: number of the source of each document, int64 [n].
    """
    rng = np.random.default_rng(seed)
    place = np.empty(len(source_of))
    for source in np.unique(source_of):
        own = np.flatnonzero(source_of == source)
        place[rng.permutation(own)] = (np.arange(len(own)) + rng.random()) / len(own)
    return np.argsort(place, kind="stable")


def _input_files(given: Any) -> list[Path]:
    if given == NEEDLES:
        return []
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError("input", given, "names no files", "Set input=[a.txt,b.jsonl], bundled or needles")
    files = [file for name in names for file in (bundled_corpus_files() if name == BUNDLED else [Path(name)])]
    for file in files:
        if not file.is_file():
            raise ConfigError("input", file, "no such file", "Give text or .jsonl files that exist")
        if file.stat().st_size == 0:
            raise ConfigError("input", file, "is empty", "Leave it out, or give another file")
    return files


def _bpe_size(tokenizer: str) -> int:
    size = tokenizer.removeprefix("bpe:")
    if not size.isdecimal() or int(size) < SMALLEST_BPE:
        raise ConfigError("tokenizer", tokenizer, f"is no size of {SMALLEST_BPE} or more", "Set e.g. bpe:4096")
    return int(size)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
