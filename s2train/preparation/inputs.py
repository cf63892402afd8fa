"""Finds the files that `input` names, and how to read each."""

from glob import glob
from pathlib import Path

from s2train.data.blend import BUNDLED
from s2train.data.bundled import BUNDLED_DOCUMENT_CHARS, bundled_corpus_files
from s2train.errors import ConfigError
from s2train.preparation.config import PrepareConfig
from s2train.preparation.formats import FORMATS
from s2train.preparation.sources import Source

NEEDLES = "needles"


def find_sources(cfg: PrepareConfig) -> list[Source]:
    """Find the files that `cfg.input` names; `needles` names none.

    Raises:
        ConfigError: the input names no files, or a file is missing or has an unsupported format; or `document_chars`
            is set, and no file is plain text.
    """
    sources = [] if cfg.input == NEEDLES else _sources(cfg)
    if cfg.document_chars is not None and all(source.format.kind != "text" for source in sources):
        problem = "cuts text files, and input names none"
        remedy = "Leave it unset: a line or row is a document"
        raise ConfigError("document_chars", cfg.document_chars, problem, remedy)
    return sources


def _sources(cfg: PrepareConfig) -> list[Source]:
    names = [cfg.input] if isinstance(cfg.input, str) else cfg.input
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError("input", cfg.input, "names no files", "Set input=[a.txt,b.jsonl], bundled or needles")
    sources = []
    for name in names:
        is_bundled = name == BUNDLED
        chars = cfg.document_chars or (BUNDLED_DOCUMENT_CHARS if is_bundled else None)
        paths = bundled_corpus_files() if is_bundled else files_named(name, "input")
        sources += [Source.of(path, chars, "auto" if is_bundled else cfg.format) for path in paths]
    return sources


def files_named(name: str, setting: str) -> list[Path]:
    """List the files of a name, with * for any characters.

    Raises:
        ConfigError: on `setting`, there is no such file, or it is a folder.
    """
    if Path(name).is_dir():
        raise ConfigError(setting, name, "is a folder", f"Name its files, such as {Path(name) / '*.txt'}")
    has_star = "*" in name and not Path(name).is_file()  # a file's own name may have one
    found = sorted(path for path in map(Path, glob(name, recursive=True) if has_star else [name]) if path.is_file())
    if not found:
        problem = "no file matches" if has_star else "no such file"
        raise ConfigError(setting, name, problem, f"Give files that exist: {FORMATS}")
    return found
