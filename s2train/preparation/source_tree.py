"""Make a corpus of a source tree: one document per subsystem.

Files of a subsystem follow each other in path order, so that headers, callers and definitions stand in one sequence.
Generated files and near-duplicates are dropped. Whole subsystems are held out, never single files.
"""

import difflib
import hashlib
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NoReturn

from s2train.distributed.worker_pool import worker_pool
from s2train.environment.cores import available_cores
from s2train.errors import ConfigError
from s2train.files import check_writable, replacing, write_json
from s2train.preparation.config import CorpusConfig

TRAIN, HELD_OUT, DESCRIPTION = "train.jsonl", "held-out.jsonl", "corpus.json"
FILES_FOR_PROCESSES = 1_000  # fewer are read in this process
_MARKERS = re.compile(
    r"do not (edit|modify)|(automatically|auto-?|machine)[ -]?generated|generated (by|from|automatically)|@generated",
    re.IGNORECASE,
)
_HEAD = 1_500  # characters in which generators leave their mark
_TABLE_LINES, _TABLE_SHARE = 400, 0.8  # a file of mostly #defines or numbers this long is a table made by a program
_ROW = re.compile(r"\s*(#\s*define\s+\w+\s+\S+|[-{\"(]?\s*(0x[0-9a-fA-F]+|\d+)\b.*[,;}]?)\s*(/\*.*\*/)?\s*$")
_SHINGLE = 5  # lines that are compared together
_SAMPLED = 8  # one shingle of this many is kept
_FEWEST_SHINGLES = 4  # shorter files are compared as a whole


@dataclass(frozen=True)
class _File:
    """Describes one file: its size and fingerprint, or why it is dropped.

    The size is in characters.
    """

    path: str
    reason: str | None = None
    chars: int = 0
    whole: bytes = b""
    shingles: frozenset[int] = frozenset()


@dataclass
class Corpus:
    """What `make_corpus` wrote.

    Attributes:
        train_documents, held_out_documents, train_chars, held_out_chars: of the two files.
        files: kept.
        dropped: files by reason.
        held_out: subsystems.
        settings: of the run.
    """

    train_documents: int = 0
    held_out_documents: int = 0
    train_chars: int = 0
    held_out_chars: int = 0
    files: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    held_out: list[str] = field(default_factory=list)
    settings: dict[str, object] = field(default_factory=dict)


def make_corpus(cfg: CorpusConfig) -> Corpus:
    """Write OUTPUT/train.jsonl, OUTPUT/held-out.jsonl and OUTPUT/corpus.json; the same tree gives the same bytes.

    A line holds `text`, the files of one subsystem in path order, each after its path, and `name`, the subsystem.
    A subsystem is a folder `cfg.depth` levels below the tree, or what lies above it. An interruption leaves an earlier
    corpus as it was.

    Raises:
        ConfigError: no tree, a part of it that can't be read, no text in it, settings out of range, an empty held-out
            part, or an output that exists.
    """
    _check(cfg)
    tree, output = Path(cfg.tree), Path(cfg.output)
    paths = sorted(_paths(tree, tuple(cfg.suffixes)), key=lambda path: PurePosixPath(path).parts)
    files, dropped = _kept(tree, paths, cfg)
    if not files:
        problem = f"none of its {len(paths):,} files with a suffix of `suffixes` holds text to keep"
        raise ConfigError("tree", cfg.tree, problem, "Set tree to a folder of source files, or suffixes=[.py,…]")
    subsystems: dict[str, list[_File]] = {}
    for file in files:
        subsystems.setdefault(_subsystem(file.path, cfg.depth), []).append(file)
    held_out = _held_out(subsystems, cfg)
    corpus = Corpus(files=len(files), dropped=dict(sorted(dropped.items())), held_out=sorted(held_out))
    corpus.settings = {name: value for name, value in asdict(cfg).items() if name != "overwrite"}
    # Renamed together: the held-out part of an earlier split may be text of this training part.
    with replacing(output / HELD_OUT) as held_out_text, replacing(output / TRAIN) as train_text:
        written = _write(train_text, tree, subsystems, subsystems.keys() - held_out)
        corpus.train_documents, corpus.train_chars = written
        corpus.held_out_documents, corpus.held_out_chars = _write(held_out_text, tree, subsystems, held_out)
        (output / DESCRIPTION).unlink(missing_ok=True)
    write_json(output / DESCRIPTION, asdict(corpus))
    return corpus


def _check(cfg: CorpusConfig) -> None:
    if not cfg.tree or not Path(cfg.tree).is_dir():
        raise ConfigError("tree", cfg.tree, "is no folder", "Set tree to the folder to read")
    if cfg.depth < 1:
        raise ConfigError("depth", cfg.depth, "must be 1 or more", "Set depth=2 for folders such as fs/ext4")
    if not cfg.held_out and not 0 < cfg.held_out_share < 1:
        problem = "must lie between 0 and 1"
        raise ConfigError(
            "held_out_share", cfg.held_out_share, problem, "Set held_out_share=0.02, or held_out=[fs/ext4]"
        )
    if not 0 < cfg.duplicate_share <= 1:
        raise ConfigError("duplicate_share", cfg.duplicate_share, "must lie in (0, 1]", "Set duplicate_share=0.8")
    if cfg.workers is not None and cfg.workers < 1:
        raise ConfigError("workers", cfg.workers, "must be 1 or more", "Set workers=1 or more, or leave it unset")
    check_writable("output", cfg.output)
    existing = [name for name in (TRAIN, HELD_OUT) if (Path(cfg.output) / name).exists()]
    if existing and not cfg.overwrite:
        raise ConfigError("output", cfg.output, f"{existing[0]} exists there", "Add overwrite=true, or set another")


def _paths(tree: Path, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Yield relative POSIX paths of the regular files to read.

    Their suffix or full name is in `suffixes`. Links are not followed, hidden folders (.git, .venv) not read.
    """
    for folder, folders, names in os.walk(tree, onerror=partial(_reject, str(tree))):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(folder) / name
            if (path.suffix in suffixes or name in suffixes) and path.is_file() and not path.is_symlink():
                yield path.relative_to(tree).as_posix()


def _reject(tree: str, error: OSError) -> NoReturn:
    """Reject a tree of which a part can't be read.

    Without it, the corpus would be another.
    """
    problem = f"{error.filename} can't be read ({error.strerror})"
    raise ConfigError("tree", tree, problem, "Make it readable, or move it out of the tree") from error


def _kept(tree: Path, paths: Sequence[str], cfg: CorpusConfig) -> tuple[list[_File], Counter[str]]:
    """Choose the files to keep, and count the dropped ones by reason.

    Kept files are in order. Of near-duplicates the first is kept.
    """
    workers = cfg.workers or available_cores()
    if workers > 1 and len(paths) > FILES_FOR_PROCESSES:
        with worker_pool(workers) as pool:
            read = list(pool.map(_read, [str(tree)] * len(paths), paths, chunksize=64))
    else:
        read = [_read(str(tree), path) for path in paths]
    dropped: Counter[str] = Counter()
    kept: list[_File] = []
    wholes: set[bytes] = set()
    seen: set[int] = set()
    for file in read:
        reason = file.reason
        if reason is None and file.whole in wholes:
            reason = "duplicate"
        if reason is None and len(file.shingles) >= _FEWEST_SHINGLES:
            known = sum(shingle in seen for shingle in file.shingles)
            if known >= cfg.duplicate_share * len(file.shingles):
                reason = "near-duplicate"
        if reason is not None:
            dropped[reason] += 1
            continue
        wholes.add(file.whole)
        seen |= file.shingles
        kept.append(file)
    return kept, dropped


def _read(tree: str, path: str) -> _File:
    if not path.isprintable():  # its name stands in the document; undecodable bytes are surrogates here
        return _File(path, "unprintable name")
    try:
        content = (Path(tree) / path).read_bytes()
    except OSError as error:
        _reject(tree, error)
    if not content.strip():
        return _File(path, "empty")
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return _File(path, "not UTF-8")
    if "\0" in text:
        return _File(path, "binary")
    if _MARKERS.search(text[:_HEAD]):
        return _File(path, "generated")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) >= _TABLE_LINES and sum(bool(_ROW.match(line)) for line in lines) >= _TABLE_SHARE * len(lines):
        return _File(path, "table")
    hashes = [zlib.crc32(line.encode()) for line in lines]
    shingles = frozenset(
        value
        for value in (hash(tuple(hashes[i : i + _SHINGLE])) for i in range(max(1, len(hashes) - _SHINGLE + 1)))
        if value % _SAMPLED == 0
    )
    return _File(path, None, len(text), hashlib.sha256("\n".join(lines).encode()).digest(), shingles)


def _subsystem(path: str, depth: int) -> str:
    return "/".join(PurePosixPath(path).parts[:-1][:depth]) or "."


def _held_out(subsystems: dict[str, list[_File]], cfg: CorpusConfig) -> set[str]:
    """Choose the names of the held-out subsystems.

    They are those of `cfg.held_out`; without it, those that come first by a hash of their names, until the share is
    reached.
    """
    if cfg.held_out:
        missing = [name for name in cfg.held_out if name not in subsystems]
        if missing:
            problem = f"{missing[0]} is no subsystem with text at depth={cfg.depth}"
            near = difflib.get_close_matches(missing[0], subsystems, n=1, cutoff=0.0)[0]
            raise ConfigError("held_out", list(cfg.held_out), problem, f"Did you mean {near}?")
        chosen = set(cfg.held_out)
    else:
        sizes = {name: sum(file.chars for file in files) for name, files in subsystems.items()}
        wanted = cfg.held_out_share * sum(sizes.values())
        chosen, size = set(), 0
        for name in sorted(sizes, key=lambda name: hashlib.sha256(f"{cfg.seed} {name}".encode()).digest()):
            # A subsystem that overshoots by far is left to the training part.
            if size < wanted and size + sizes[name] <= 1.5 * wanted:
                chosen.add(name)
                size += sizes[name]
    if not chosen:
        problem = f"no subsystem at depth={cfg.depth} is small enough to hold out"
        raise ConfigError("held_out_share", cfg.held_out_share, problem, "Set held_out=[SUBSYSTEM,…], or raise depth")
    if len(chosen) == len(subsystems):
        raise ConfigError("held_out", list(cfg.held_out), "leaves no subsystem to train on", "Hold out fewer")
    return chosen


def _write(path: Path, tree: Path, subsystems: dict[str, list[_File]], wanted: set[str]) -> tuple[int, int]:
    """Write the documents of `wanted` subsystems; their number and characters."""
    documents = chars = 0
    with path.open("w", encoding="utf-8") as out:
        for name, files in subsystems.items():
            if name not in wanted:
                continue
            parts = (f"{file.path}\n{(tree / file.path).read_text(encoding='utf-8').rstrip()}\n" for file in files)
            text = "\n".join(parts)
            out.write(json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n")
            documents, chars = documents + 1, chars + len(text)
    return documents, chars
