"""Text files, or documents made for needle retrieval, to Megatron indexed datasets."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from s2train.config import PrepareConfig
from s2train.data.blend import BUNDLED
from s2train.data.bundled import bundled_corpus_files, count_ids, unigram_entropy
from s2train.data.documents import bad_document, no_text, read_documents
from s2train.data.indexed import Metadata, read_document_lengths, read_metadata
from s2train.data.meter import Meter
from s2train.data.needle_documents import needle_documents, needle_texts
from s2train.data.sources import FORMATS, PIECE_BYTES, BadDocumentError, Piece, read_pieces
from s2train.data.spool import Spool, open_folder
from s2train.data.tokenizers import SMALLEST_BPE, Tokenizer, load_tokenizer, train_bpe
from s2train.data.tokenizing import Encoding, encode_all
from s2train.errors import ConfigError, TrainingError
from s2train.files import check_writable, replacing

_TOKENIZER = "-tokenizer.json"
_BYTES_OF_A_WORKER = 4 << 20  # with less to do, starting it takes longer than its work
NEEDLES = "needles"


def prepare(cfg: PrepareConfig) -> Metadata:
    """Write OUTPUT.bin, OUTPUT.idx and the sidecar OUTPUT.json; same input and settings, same bytes.

    Documents end with the tokenizer's end of document. They are shuffled such that each source is spread
    evenly, so that a held-out part, which Megatron takes from the end, holds its share of every source.

    The work is done in a folder .OUTPUT.partial and renamed when complete, the .idx last: where there is an .idx,
    the rest is whole. What interrupts it, a kill or a full disk, leaves the folder: the same settings on the same
    files go on from there, others begin anew.

    Raises ConfigError for input that is missing or holds no text, a tokenizer that can't be used, output that exists
    already, unless `overwrite`, and output that another process is at work on; TrainingError when the disk is full.
    """
    sources = _input_files(cfg.input)
    for setting, value in {"document_chars": cfg.document_chars, "workers": cfg.workers}.items():
        if value is not None and value < 1:
            raise ConfigError(setting, value, "must be 1 or more", f"Set {setting} to 1 or more, or leave it out")
    output = Path(cfg.output)
    if not output.name:
        raise ConfigError("output", cfg.output, "names no file", "Set a prefix, e.g. runs/data/mine")
    if output.suffix in (".bin", ".idx"):
        problem = "is a prefix, to which .bin and .idx are added"
        raise ConfigError("output", cfg.output, problem, f"Set output={output.with_suffix('')}")
    folder = output.with_name(f".{output.name}.partial")
    # in the order of renaming
    names = [*([_TOKENIZER] if cfg.tokenizer.startswith("bpe:") else []), ".bin", ".json", ".idx"]
    final = {name: output.with_name(output.name + name) for name in names}
    existing = [str(path) for path in final.values() if path.exists()]
    if existing and not cfg.overwrite and not (folder / "publishing").exists():
        raise ConfigError("output", cfg.output, f"{', '.join(existing)} exists", "Add overwrite=true, or set another")
    if cfg.tokenizer.startswith("bpe:"):
        _bpe_size(cfg.tokenizer)
    else:
        load_tokenizer(cfg.tokenizer, "tokenizer")

    check_writable("output", output.parent)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError("output", cfg.output, "another process prepares it", "Wait, or set another") from error
    try:
        goes_on = open_folder(folder, _key(cfg, sources))
        if not (goes_on and (folder / "publishing").exists()):
            if existing and not cfg.overwrite:  # of other work than what was about to be published
                raise ConfigError("output", cfg.output, f"{existing[0]} exists", "Add overwrite=true")
            _write(cfg, sources, folder, str(final.get(_TOKENIZER, cfg.tokenizer)))
            (folder / "publishing").touch()
        if (folder / "out.idx").exists():
            final[".idx"].unlink(missing_ok=True)  # so that no old index ever stands beside a new .bin
        for name in names:
            if (folder / f"out{name}").exists():
                (folder / f"out{name}").replace(final[name])
    except ConfigError as error:
        # Going on would lead there again, unless a disk failed for a moment.
        if getattr(error.__cause__, "errno", None) is None:
            shutil.rmtree(folder)
        raise
    except OSError as error:
        raise TrainingError(f"{output}: {error}. {folder} keeps what is done: run it again to go on") from error
    finally:
        lock.release()
    # In one step: a folder half removed would look like work that has just begun, on an output that is there.
    done = folder.with_suffix(".done")
    shutil.rmtree(done, ignore_errors=True)
    shutil.rmtree(folder.rename(done))
    metadata = read_metadata(str(output))
    assert metadata is not None
    return metadata


def _write(cfg: PrepareConfig, sources: list[Path], folder: Path, tokenizer_name: str) -> None:
    """Make out.bin, out.json, out.idx, and out-tokenizer.json if asked for, in `folder`."""
    path = cfg.tokenizer
    if path.startswith("bpe:"):
        path = str(folder / f"out{_TOKENIZER}")
        if not Path(path).exists():
            texts = needle_texts(cfg.needles, cfg.seed) if cfg.input == NEEDLES else _texts(cfg, sources)
            with replacing(Path(path)) as temporary:
                train_bpe(texts, _bpe_size(cfg.tokenizer), temporary)
    tokenizer = load_tokenizer(path, "tokenizer")
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    if cfg.input == NEEDLES:
        _assemble(folder, needle_documents(cfg.needles, tokenizer, cfg.seed), cfg.needles.documents, dtype)
    else:
        _assemble_files(cfg, sources, folder, Encoding(path, np.dtype(dtype).name, cfg.text_key), dtype)
    with ThreadPoolExecutor(cfg.workers or _cores()) as pool:
        sums = dict(zip(map(str, sources), pool.map(_sha256, sources), strict=True))
    _describe(folder, tokenizer, tokenizer_name, sums, dtype)


def _texts(cfg: PrepareConfig, sources: list[Path]) -> Iterator[str]:
    """All documents, to train a tokenizer on."""
    sizes = [source.stat().st_size for source in sources]
    meter, read, documents, size = Meter("reading for the tokenizer", sum(sizes)), 0, 0, 0

    def told(position: int) -> None:
        meter.update(read + position, documents, size)

    for source, length in zip(sources, sizes, strict=True):
        for text in read_documents(source, cfg.document_chars, cfg.text_key, told):
            documents, size = documents + 1, size + len(text.encode())
            yield text
        read += length
    meter.close()


def _assemble_files(
    cfg: PrepareConfig, sources: list[Path], folder: Path, encoding: Encoding, dtype: type[np.number]
) -> None:
    """Tokenize what the spool lacks, and write its documents in the order that spreads every source."""
    spool = Spool(folder, np.dtype(dtype).name)
    if not spool.done.complete:
        _tokenize(cfg, sources, spool, encoding)

    tokens, lengths, source_of = spool.read()
    starts = np.cumsum(lengths) - lengths
    order = spread_order(source_of, cfg.seed)
    _assemble(folder, (tokens[starts[i] : starts[i] + lengths[i]] for i in order), len(lengths), dtype)


def _tokenize(cfg: PrepareConfig, sources: list[Path], spool: Spool, encoding: Encoding) -> None:
    """Fill the spool with what it lacks."""
    sizes = [source.stat().st_size for source in sources]
    starts = [0, *np.cumsum(sizes).tolist()]
    # Bytes as ids take less time to make than to hand from process to process (launch/results/2026-11-22-prepare.json).
    most = 1 if encoding.tokenizer == "bytes" else _cores()
    workers = min(cfg.workers or most, max(1, sum(sizes) // _BYTES_OF_A_WORKER))
    skipped, before = spool.done.pieces, spool.done.text_bytes
    meter: Meter | None = None
    with spool.writing():
        pieces = _pieces(cfg, sources)
        source = max(spool.done.sources_with_text, default=0)
        try:
            for piece in encode_all(islice(pieces, skipped, None), encoding, workers):
                if piece.source > source:
                    _check_text(sources[piece.source - 1], piece.source - 1, spool)
                source = piece.source
                spool.add(piece)
                done = starts[source] + piece.position
                if meter is None:
                    meter = Meter("tokenizing", starts[-1], before=done if skipped else 0)
                meter.update(done, spool.done.documents, spool.done.text_bytes - before)
        except BadDocumentError as error:
            raise bad_document(sources[error.source], error) from error
        _check_text(sources[-1], len(sources) - 1, spool)
        spool.finish()
    if meter is not None:
        meter.close()


def _pieces(cfg: PrepareConfig, sources: list[Path]) -> Iterator[Piece]:
    for number, source in enumerate(sources):
        yield from read_pieces(source, number, cfg.document_chars, cfg.text_key)


def _check_text(source: Path, number: int, spool: Spool) -> None:
    """Whether a source that was read held text, given that those before it, if they had any pieces, did."""
    if spool.done.sources_with_text[-1:] != [number]:
        raise no_text(source)


def _assemble(folder: Path, documents: Iterable[npt.NDArray[np.integer]], count: int, dtype: type[np.number]) -> None:
    """Write `count` documents to out.bin and out.idx, which are on disk when this returns."""
    builder = IndexedDatasetBuilder(str(folder / "out.bin"), dtype=dtype)
    meter = Meter("writing", count)
    size = 0
    for number, document in enumerate(documents, start=1):
        builder.add_document(document, [len(document)])
        size += document.nbytes
        meter.update(number, number, size)
    builder.finalize(str(folder / "out.idx"))
    meter.close()
    for name in ("out.bin", "out.idx"):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())


def _describe(folder: Path, tokenizer: Tokenizer, name: str, sources: dict[str, str], dtype: type[np.number]) -> None:
    """Write out.json of what lies in out.bin and out.idx, found sound."""
    documents = len(read_document_lengths(str(folder / "out")))
    tokens = np.memmap(folder / "out.bin", dtype=dtype, mode="r")
    metadata = Metadata(
        tokenizer=name,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        documents=documents,
        tokens=len(tokens),
        unigram_entropy=unigram_entropy(count_ids(tokens, tokenizer.vocab_size)),
        sources=sources,
    )
    metadata.write(folder / "out.json")


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


def _key(cfg: PrepareConfig, sources: list[Path]) -> str:
    """What a folder's half-done work depends on."""
    files = [(source.resolve(), source.stat()) for source in sources]
    tokenizer = cfg.tokenizer if cfg.tokenizer.startswith("bpe:") else load_tokenizer(cfg.tokenizer).fingerprint
    return json.dumps(
        {
            "sources": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in files],
            "tokenizer": [cfg.tokenizer, tokenizer],
            "cut": [cfg.document_chars, cfg.text_key, PIECE_BYTES],
            "seed": cfg.seed,
            "needles": asdict(cfg.needles) if cfg.input == NEEDLES else None,
        }
    )


def _input_files(given: Any) -> list[Path]:
    if given == NEEDLES:
        return []
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError("input", given, "names no files", "Set input=[a.txt,b.jsonl], bundled or needles")
    files = [file for name in names for file in (bundled_corpus_files() if name == BUNDLED else _named(name))]
    for file in files:
        if not file.is_file():
            raise ConfigError("input", file, "no such file", f"Give files that exist: {FORMATS}")
        if file.stat().st_size == 0:
            raise ConfigError("input", file, "is empty", "Leave it out, or give another file")
    return files


def _named(name: str) -> list[Path]:
    """The files of a name in which * may stand for any."""
    if "*" not in name:
        return [Path(name)]
    found = sorted(Path(path) for path in glob(name, recursive=True) if Path(path).is_file())
    if not found:
        raise ConfigError("input", name, "no file has such a name", f"Give files that exist: {FORMATS}")
    return found


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _bpe_size(tokenizer: str) -> int:
    size = tokenizer.removeprefix("bpe:")
    if not size.isdecimal() or int(size) < SMALLEST_BPE:
        raise ConfigError("tokenizer", tokenizer, f"is no size of {SMALLEST_BPE} or more", "Set e.g. bpe:4096")
    return int(size)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
