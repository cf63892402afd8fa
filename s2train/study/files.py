"""Names a quality study's files, and checks that they belong together."""

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2train.checkpoints.listing import checkpoints_of
from s2train.command_line.commands import python_command
from s2train.data.indexed import read_metadata
from s2train.errors import ConfigError
from s2train.files import reading
from s2train.preparation.source_tree import DESCRIPTION, HELD_OUT, TRAIN
from s2train.study.variants import Run


@dataclass(frozen=True)
class Folders:
    """The study's folder, and the folder of its programs.

    ROOT/corpus/                  train.jsonl, held-out.jsonl, corpus.json
    ROOT/data/                    tokenized splits, the tokenizer, corpus.json of the split they were made of
    ROOT/runs/RUN/                run folders; shared-gpu: there if other programs ran on the GPU of one of its starts
    ROOT/results/RUN.json         results of training; RUN-probes.json: of the probes; RUN-needles.json: of needle
                                  tasks; sweep.json: what the sweep chose; speed.json: throughput of first steps
    """

    root: Path
    launch: Path

    @property
    def corpus(self) -> Path:
        return self.root / "corpus"

    @property
    def train_text(self) -> Path:
        return self.corpus / TRAIN

    @property
    def held_out_text(self) -> Path:
        return self.corpus / HELD_OUT

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def train_data(self) -> Path:
        return self.data / "train"

    @property
    def held_out_data(self) -> Path:
        return self.data / "held-out"

    @property
    def tokenizer(self) -> Path:
        return self.data / "train-tokenizer.json"

    @property
    def results(self) -> Path:
        return self.root / "results"

    @property
    def sweep(self) -> Path:
        return self.results / "sweep.json"

    @property
    def speed(self) -> Path:
        return self.results / "speed.json"

    def command(self, action: str, *words: object) -> str:
        """Return the shell command that takes an action of the study."""
        return python_command("launch/quality_study.py", action, *words, "--root", self.root)

    def program(self, name: str) -> str:
        return str(self.launch / name)

    def run(self, run: Run) -> Path:
        return self.root / "runs" / run.name

    def has_checkpoint(self, run: Run) -> bool:
        return bool(checkpoints_of(self.run(run)))

    def shared_gpu(self, run: Run) -> Path:
        return self.run(run) / "shared-gpu"

    def result(self, run: Run) -> Path:
        return self.results / f"{run.name}.json"

    def probes(self, run: Run) -> Path:
        return self.results / f"{run.name}-probes.json"

    def needles(self, run: Run) -> Path:
        return self.results / f"{run.name}-needles.json"


def naming(path: Path) -> AbstractContextManager[None]:
    """Name a result file that can't be read, by `reading`."""
    return reading("root", path, "is no result of this study", "Move the file away")


def check_corpus(folders: Folders) -> None:
    """Check that both splits hold text.

    Raises:
        ConfigError: a split is missing or empty.
    """
    _check_text(folders, folders.train_text)
    check_held_out(folders)


def check_held_out(folders: Folders) -> None:
    """Check that the held-out split holds text.

    Raises:
        ConfigError: it is missing or empty.
    """
    _check_text(folders, folders.held_out_text)


def _check_text(folders: Folders, path: Path) -> None:
    if not path.is_file():
        remedy = f"Make the corpus: {folders.command('data', '--tree', 'TREE')}"
        raise ConfigError("root", folders.root, f"{path} is missing", remedy)
    if path.stat().st_size == 0:
        remedy = f"Delete {folders.corpus}, and make it with a larger held_out_share"
        raise ConfigError("root", folders.root, f"{path} is empty", remedy)


def record_split(folders: Folders) -> None:
    """Record which split the tokenizer is trained on."""
    folders.data.mkdir(parents=True, exist_ok=True)
    (folders.data / DESCRIPTION).write_bytes((folders.corpus / DESCRIPTION).read_bytes())


def check_same_split(folders: Folders) -> None:
    """Check that the tokenizer was trained on the present training split.

    Raises:
        ConfigError: the corpus was made again with another split, or a description is damaged.
    """
    made, now = folders.data / DESCRIPTION, folders.corpus / DESCRIPTION
    if made.is_file() and now.is_file() and _split(made) != _split(now):
        problem = f"{folders.tokenizer} was trained on another split than the one in {folders.corpus}"
        raise ConfigError(
            "root", folders.root, problem, f"Delete {folders.data} and run `data` again, or set another root"
        )


def _split(description: Path) -> dict[str, Any]:
    """A split's description, without the places where it was made."""
    content = read_description(description)
    kept = {name: value for name, value in content["settings"].items() if name not in ("tree", "output", "workers")}
    return content | {"settings": kept}


def read_description(path: Path) -> dict[str, Any]:
    """Read a corpus.json, which has `settings`.

    Raises:
        ConfigError: the file is damaged.
    """
    remedy = f"Copy it back, or delete {path.parent} and run `data` again"
    with reading("root", path, "describes no corpus", remedy):
        content: dict[str, Any] = json.loads(path.read_text())
        return content | {"settings": dict(content.get("settings", {}))}


def read_texts(folders: Folders) -> dict[str, str] | None:
    """Fingerprint the texts and the tokenizer of the data.

    None if they are not recorded.
    """
    found = {path.name: read_metadata(str(path)) for path in (folders.train_data, folders.held_out_data)}
    texts = dict[str, str]()
    for split, metadata in found.items():
        if metadata is None:
            return None
        texts[split] = " ".join(sorted(metadata.sources.values()))
        texts["tokenizer"] = metadata.fingerprint
    return texts


def check_data(folders: Folders) -> None:
    """Check that the study can train.

    Training needs the tokenized splits only: their text may be elsewhere.

    Raises:
        ConfigError: data or their tokenizer are missing, empty or of another split.
    """
    if not (folders.data / DESCRIPTION).is_file():
        check_corpus(folders)
    check_same_split(folders)
    for prefix in (folders.train_data, folders.held_out_data):
        if not prefix.with_name(prefix.name + ".idx").is_file():
            remedy = f"Run {folders.command('data')}"
            raise ConfigError("root", folders.root, f"{prefix}.idx is missing", remedy)
    check_tokenizer(folders)


def check_tokenizer(folders: Folders) -> None:
    """Check that tokenized splits have their tokenizer.

    Raises:
        ConfigError: it is missing. One trained again may differ.
    """
    if not folders.tokenizer.is_file() and any(folders.data.glob("*.idx")):
        problem = f"{folders.tokenizer} is missing, by which the data were made"
        remedy = f"Copy it back, or delete {folders.data} and run `data` again"
        raise ConfigError("root", folders.root, problem, remedy)
