"""Finds the files that `input` names, and how to read each."""

from glob import glob
from pathlib import Path

from s2train.config import PrepareConfig
from s2train.data.blend import BUNDLED
from s2train.data.bundled import BUNDLED_DOCUMENT_CHARS, bundled_corpus_files
from s2train.errors import ConfigError
from s2train.preparation.formats import FORMATS
from s2train.preparation.sources import Source

NEEDLES = "needles"


def find_sources(cfg: PrepareConfig) -> list[Source]:
    """Find the files that `cfg.input` names; `needles` names none.

    Raises:
        ConfigError: the input names no files, or a file is missing or has an unsupported format.
    """
    if cfg.input == NEEDLES:
        return []
    names = [cfg.input] if isinstance(cfg.input, str) else cfg.input
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError("input", cfg.input, "names no files", "Set input=[a.txt,b.jsonl], bundled or needles")
    sources = []
    for name in names:
        is_bundled = name == BUNDLED
        chars = cfg.document_chars or (BUNDLED_DOCUMENT_CHARS if is_bundled else None)
        for path in bundled_corpus_files() if is_bundled else files_named(name, "input"):
            if not path.is_file():
                raise ConfigError("input", path, "no such file", f"Give files that exist: {FORMATS}")
            sources.append(Source.of(path, chars, "auto" if is_bundled else cfg.format))
    return sources


def files_named(name: str, setting: str) -> list[Path]:
    """List the files of a name, with * for any characters.

    A name without * may be of a file that doesn't exist.

    Raises:
        ConfigError: on `setting`, no file matches.
    """
    if "*" not in name:
        return [Path(name)]
    found = sorted(Path(path) for path in glob(name, recursive=True) if Path(path).is_file())
    if not found:
        raise ConfigError(setting, name, "no file matches", f"Give files that exist: {FORMATS}")
    return found
