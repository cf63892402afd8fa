"""Prepares Megatron indexed datasets from text files or generated needle documents."""

import hashlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from s2train.command_line.commands import shell_setting
from s2train.data.bundled import count_ids, unigram_entropy
from s2train.data.indexed import Metadata, read_document_lengths, read_metadata
from s2train.data.tokenizers import LARGEST_BPE, SMALLEST_BPE, load_tokenizer, train_bpe
from s2train.environment.cores import available_cores
from s2train.errors import ConfigError, TrainingError
from s2train.files import check_writable, replacing
from s2train.needles.documents import needle_documents, needle_texts
from s2train.preparation.config import PrepareConfig
from s2train.preparation.cutting import split_documents
from s2train.preparation.documents import bad_document, read_documents
from s2train.preparation.formats import FORMATS
from s2train.preparation.inputs import NEEDLES, find_sources
from s2train.preparation.progress import Meter
from s2train.preparation.resumable_writer import ResumableWriter, open_folder
from s2train.preparation.sources import PIECE_BYTES, BadDocumentError, Piece, Source, read_pieces
from s2train.preparation.tokenizing import Encoding, encode_all
from s2train.validation.values import check_seed

_TOKENIZER = "-tokenizer.json"
_BYTES_PER_WORKER = 4 << 20  # with less input, starting a worker takes longer than its work
_TRAINING_CHARS = 1 << 20  # longer texts are cut for training a BPE, which needs many times their size in memory
_VERSION = 3  # version of the unfinished files in a folder .OUTPUT.partial


def prepare(cfg: PrepareConfig) -> Metadata:
    """Write OUTPUT.bin, OUTPUT.idx and the sidecar OUTPUT.json.

    The same input and settings give the same bytes. Documents end with the tokenizer's end of document, to which no
    text may encode. They are shuffled so that each source is spread evenly. The held-out part, which Megatron takes
    from the end, then holds a share of every source.

    Files are written in a folder .OUTPUT.partial and renamed when complete, the .idx last: if there is an .idx, the
    other files are complete. An interruption (a kill, a full disk) leaves the folder: the same settings on the same
    files resume from it, others start over.

    Files without text are left out and recorded in the sidecar.

    Raises:
        ConfigError: the input is missing or holds no text, the tokenizer can't be used, the output exists without
            `overwrite`, or another process is writing it.
        TrainingError: the disk is full.
    """
    for setting in ("document_chars", "workers", "tokenizer_chars"):
        if (value := getattr(cfg, setting)) is not None and value < 1:
            raise ConfigError(setting, value, "must be 1 or more", f"Set {setting} to 1 or more, or leave it unset")
    check_seed(cfg.seed)
    sources = find_sources(cfg)
    output = _prefix(cfg)
    folder = output.with_name(f".{output.name}.partial")
    # in the order of renaming
    names = [*([_TOKENIZER] if cfg.tokenizer.startswith("bpe:") else []), ".bin", ".json", ".idx"]
    final = {name: output.with_name(output.name + name) for name in names}
    existing = [str(path) for path in final.values() if os.path.exists(path)]
    if existing and not cfg.overwrite and not (folder / "publishing").exists():
        raise ConfigError(
            "output", cfg.output, f"already exists: {', '.join(existing)}", "Add overwrite=true, or set another"
        )
    if cfg.tokenizer.startswith("bpe:"):
        _bpe_size(cfg.tokenizer)
    else:
        load_tokenizer(cfg.tokenizer, "tokenizer", cfg.end_token)

    check_writable("output", output.parent, output)
    with _resumable(cfg, folder):
        resumes = open_folder(folder, _key(cfg, sources))
        if not (resumes and (folder / "publishing").exists()):
            if existing and not cfg.overwrite:  # not written by the interrupted renames
                raise ConfigError("output", cfg.output, f"{existing[0]} exists", "Add overwrite=true")
            _write(cfg, sources, folder, str(final.get(_TOKENIZER, cfg.tokenizer)))
            (folder / "publishing").touch()
        if (folder / "out.idx").exists():
            final[".idx"].unlink(missing_ok=True)  # no old index may belong to a new .bin
        for name, path in final.items():
            if (folder / f"out{name}").exists():
                (folder / f"out{name}").replace(path)
    # Rename it first: a half-removed folder would look like new work on an existing output.
    done = folder.with_suffix(".done")
    shutil.rmtree(done, ignore_errors=True)
    shutil.rmtree(folder.rename(done))
    metadata = read_metadata(str(output))
    assert metadata is not None
    return metadata


def _prefix(cfg: PrepareConfig) -> Path:
    output = Path(cfg.output)
    if not output.name or cfg.output.endswith("/"):
        raise ConfigError("output", cfg.output, "names no file", "Set a prefix, e.g. runs/data/mine")
    if output.suffix in (".bin", ".idx"):
        problem = "is a prefix, to which .bin and .idx are added"
        raise ConfigError("output", cfg.output, problem, f"Set {shell_setting('output', output.with_suffix(''))}")
    return output


@contextmanager
def _resumable(cfg: PrepareConfig, folder: Path) -> Iterator[None]:
    """Lock the folder of unfinished files; keep it if work can resume.

    Raises:
        ConfigError: another process has it, or an error within; the folder is then removed, unless the disk failed.
        TrainingError: the disk failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError("output", cfg.output, "another process is writing it", "Wait, or set another") from error
    try:
        yield
    except ConfigError as error:
        # Resuming would raise the same error, unless it was an error of the disk.
        if getattr(error.__cause__, "errno", None) is None:
            shutil.rmtree(folder)
        raise
    except OSError as error:
        raise TrainingError(
            f"{cfg.output}: {error}. {folder} keeps the progress: run the same command again to resume"
        ) from error
    finally:
        lock.release()


def _write(cfg: PrepareConfig, sources: list[Source], folder: Path, tokenizer_name: str) -> None:
    """Write out.bin, out.json, out.idx and, for a new BPE, out-tokenizer.json to `folder`."""
    path = cfg.tokenizer
    if path.startswith("bpe:"):
        path = str(folder / f"out{_TOKENIZER}")
        if not Path(path).exists():
            texts = needle_texts(cfg.needles, cfg.seed) if cfg.input == NEEDLES else _texts(cfg, sources)
            with replacing(Path(path)) as temporary:
                train_bpe(texts, _bpe_size(cfg.tokenizer), temporary, cfg.end_token)
    tokenizer = load_tokenizer(path, "tokenizer", cfg.end_token)
    if cfg.tokenizer.startswith("bpe:") and tokenizer.vocab_size < _bpe_size(cfg.tokenizer):
        problem = f"the text yields only {tokenizer.vocab_size:,} ids"
        raise ConfigError("tokenizer", cfg.tokenizer, problem, f"Set bpe:{tokenizer.vocab_size}, or give more text")
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    metadata = Metadata(
        tokenizer=tokenizer_name,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        documents=0,
        tokens=0,
        unigram_entropy=0.0,
        sources={},
        end_token=tokenizer.end_token,
    )
    if cfg.input == NEEDLES:
        documents = needle_documents(cfg.needles, tokenizer, cfg.seed)
        _assemble(folder, documents, cfg.needles.documents, dtype)
    else:
        encoding = Encoding(path, np.dtype(dtype).name, cfg.text_key, cfg.end_token)
        metadata = _assemble_files(cfg, sources, folder, encoding, metadata)
    with ThreadPoolExecutor(cfg.workers or available_cores()) as pool:
        paths = [source.path for source in sources]
        sums = dict(zip(map(str, paths), pool.map(_sha256, paths), strict=True))
    _describe(folder, replace(metadata, sources=sums), dtype)


def _texts(cfg: PrepareConfig, sources: list[Source]) -> Iterator[str]:
    """Yield about `tokenizer_chars` of text to train a tokenizer on.

    It is taken evenly from all documents.
    """
    sizes = [source.path.stat().st_size for source in sources]
    meter, read, documents, size = Meter("reading for the tokenizer", sum(sizes)), 0, 0, 0
    share = min(1.0, cfg.tokenizer_chars / max(1, sum(sizes)))  # compressed files hold more, and give more
    part_chars = _TRAINING_CHARS if share == 1.0 else _TRAINING_CHARS // 16  # smaller ones spread more evenly
    due, taken = 0.0, 0  # characters

    def on_position(position: int) -> None:
        meter.update(read + position, documents, size)

    for source, length in zip(sources, sizes, strict=True):
        for text in read_documents(source, cfg.text_key, on_position):
            documents, size = documents + 1, size + len(text.encode())
            for part in split_documents(io.StringIO(text), part_chars):
                due += share * len(part)
                if due > taken:
                    taken += len(part)
                    yield part
        read += length
    meter.close()
    if not documents:
        raise _no_text(sources)


def _assemble_files(
    cfg: PrepareConfig, sources: list[Source], folder: Path, encoding: Encoding, metadata: Metadata
) -> Metadata:
    """Tokenize the files, and write their documents with sources spread evenly.

    Returns `metadata`, completed by statistics of the files.
    """
    writer = ResumableWriter(folder, encoding.dtype)
    if not writer.done.complete:
        _tokenize(cfg, sources, writer, encoding)

    tokens, lengths, source_of = writer.read()
    starts = np.cumsum(lengths) - lengths
    order = spread_order(source_of, cfg.seed)
    dtype: type[np.number] = np.dtype(encoding.dtype).type
    _assemble(folder, (tokens[starts[i] : starts[i] + lengths[i]] for i in order), len(lengths), dtype)
    documents = np.bincount(source_of, minlength=len(sources)).tolist()
    cut = [n for n, source in zip(documents, sources, strict=True) if n > 1 and source.format.kind == "text"]
    return replace(
        metadata,
        formats=dict(Counter(str(source.format) for source in sources)),
        document_chars=next((source.document_chars for source in sources if source.document_chars), None),
        files_cut=len(cut),
        documents_cut=sum(cut),
        blank_rows=writer.done.blank,
        replaced_surrogates=writer.done.replaced,
        files_without_text=[str(source.path) for source, count in zip(sources, documents, strict=True) if not count],
    )


def _tokenize(cfg: PrepareConfig, sources: list[Source], writer: ResumableWriter, encoding: Encoding) -> None:
    """Tokenize the pieces that `writer` does not hold yet."""
    sizes = [source.path.stat().st_size for source in sources]
    starts = [0, *np.cumsum(sizes).tolist()]
    # Byte ids take less time to compute than to send between processes (launch/results/2026-11-22-prepare.json).
    most = 1 if encoding.tokenizer == "bytes" else available_cores()
    if all(source.format.kind == "text" and source.document_chars is None for source in sources):
        most = min(most, len(sources))  # one piece each; the tokenizer encodes parts of a long one in threads
    workers = min(cfg.workers or most, max(1, sum(sizes) // _BYTES_PER_WORKER))
    skipped, before = writer.done.pieces, writer.done.text_bytes
    meter: Meter | None = None
    with writer.writing():
        pieces = _pieces(cfg, sources)
        try:
            for piece in encode_all(islice(pieces, skipped, None), encoding, workers):
                writer.add(piece)
                done = starts[piece.source] + piece.position
                if meter is None:
                    meter = Meter("tokenizing", starts[-1], before=done if skipped else 0)
                meter.update(done, writer.done.documents, writer.done.text_bytes - before)
        except BadDocumentError as error:
            raise bad_document(sources[error.source].path, error) from error
        if not writer.done.documents:
            raise _no_text(sources)
        writer.finish()
    if meter is not None:
        meter.close()


def _pieces(cfg: PrepareConfig, sources: list[Source]) -> Iterator[Piece]:
    for number, source in enumerate(sources):
        yield from read_pieces(source, number, cfg.text_key)


def _no_text(sources: list[Source]) -> ConfigError:
    """Make the error for input that holds no text."""
    given = sources[0].path if len(sources) == 1 else f"[{sources[0].path},…]"
    problem = "holds no text" if len(sources) == 1 else f"none of {len(sources)} files holds text"
    return ConfigError("input", given, problem, f"Give files that hold text: {FORMATS}")


def _assemble(folder: Path, documents: Iterable[npt.NDArray[np.integer]], count: int, dtype: type[np.number]) -> None:
    """Write `count` documents to out.bin and out.idx, and sync them to disk."""
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


def _describe(folder: Path, metadata: Metadata, dtype: type[np.number]) -> None:
    """Check out.bin and out.idx, and describe them in out.json."""
    tokens = np.memmap(folder / "out.bin", dtype=dtype, mode="r")
    replace(
        metadata,
        documents=len(read_document_lengths(str(folder / "out"))),
        tokens=len(tokens),
        unigram_entropy=unigram_entropy(count_ids(tokens, metadata.vocab_size)),
    ).write(folder / "out.json")


def spread_order(source_of: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """Order documents so that sources are spread evenly.

    Every stretch holds each source's share, within one document. Within a source the order is random. The k-th of its n
    documents is placed at (k + u)/n of the whole, with one random u in [0, 1) per source, so that many sources with few
    documents mix too.

    Args:
        source_of: number of the source of each document, int64 [n].
    Returns:
        int64 [n].
    """
    rng = np.random.default_rng(seed)
    place = np.empty(len(source_of))
    for source in np.unique(source_of):
        own = np.flatnonzero(source_of == source)
        place[rng.permutation(own)] = (np.arange(len(own)) + rng.random()) / len(own)
    return np.argsort(place, kind="stable")


def _key(cfg: PrepareConfig, sources: list[Source]) -> str:
    """Everything that determines the unfinished files, as JSON: equal keys may resume."""
    files = [(source, source.path.resolve(), source.path.stat()) for source in sources]
    tokenizer = cfg.tokenizer
    if not tokenizer.startswith("bpe:"):
        tokenizer = load_tokenizer(tokenizer, "tokenizer", cfg.end_token).fingerprint
    return json.dumps(
        {
            "version": _VERSION,
            "sources": [
                [str(path), stat.st_size, stat.st_mtime_ns, str(source.format), source.document_chars]
                for source, path, stat in files
            ],
            "tokenizer": [cfg.tokenizer, tokenizer, cfg.end_token, cfg.tokenizer_chars],
            "cut": [cfg.text_key, PIECE_BYTES],
            "seed": cfg.seed,
            "needles": asdict(cfg.needles) if cfg.input == NEEDLES else None,
        }
    )


def _bpe_size(tokenizer: str) -> int:
    size = tokenizer.removeprefix("bpe:")
    if not size.isdecimal() or not SMALLEST_BPE <= int(size) <= LARGEST_BPE:
        problem = f"its size is not a number from {SMALLEST_BPE} to {LARGEST_BPE:,}"
        raise ConfigError("tokenizer", tokenizer, problem, "Set e.g. bpe:4096")
    return int(size)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
