"""Continues the study's runs on needle documents, and collects what they find."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from s2train.command_line.commands import hydra_setting, hydra_settings
from s2train.data.indexed import read_metadata
from s2train.data.tokenizers import fingerprint
from s2train.errors import ConfigError
from s2train.files import write_json
from s2train.needles.recipe import PHASES as RECIPE
from s2train.needles.recipe import document_settings, evaluation_settings
from s2train.needles.results import NeedleResults, file_name, load_results
from s2train.study.files import Folders
from s2train.study.variants import PHASES, Phase, Run

TASKS = ("single", "key_value")  # whose facts the documents hold
TRIALS = 10  # per length, depth and task
_DOCUMENTS = RECIPE[-2]  # of the recipe for 128k tokens, made as long as a phase of the study


def needle_blend(folders: Folders, phase: Phase) -> list[float | Path]:
    """Return the value of data.path: documents of all sources, by weight."""
    return [part for source, weight in _DOCUMENTS.blend for part in (weight, _prefix(folders, phase, source))]


@dataclass(frozen=True)
class Documents:
    """Needle documents of one source.

    Attributes:
        prefix: of the dataset.
        command: makes it.
        drawn: documents that a run draws, at most once each.
    """

    prefix: Path
    command: list[str]
    drawn: float

    @property
    def index(self) -> Path:
        return Path(f"{self.prefix}.idx")

    def check(self, folders: Folders) -> None:
        """Check that documents made before fit the run.

        Raises:
            ConfigError: they were made with another tokenizer, or are too few.
        """
        found = read_metadata(str(self.prefix))
        problem = ""
        if found is None or found.fingerprint != fingerprint(str(folders.tokenizer)):
            problem = f"{self.prefix}.json does not name the tokenizer of this study, {folders.tokenizer}"
        elif found.documents <= self.drawn:
            problem = f"{self.prefix} has {found.documents:,} documents, of which this run would read some twice"
        if problem:
            remedy = f"Delete {self.prefix}.* to make them again, or set another root"
            raise ConfigError("root", folders.root, problem, remedy)


def needle_documents(folders: Folders, phase: Phase, sequences: int, steps: int) -> list[Documents]:
    """Return the documents of all sources of a phase.

    Args:
        sequences: of a step.
    """
    documents, made = replace(_DOCUMENTS, length=phase.length, batch=sequences, steps=steps), []
    for source, weight in documents.blend:
        output = _prefix(folders, phase, source)
        paths = hydra_settings({"output": output, "tokenizer": folders.tokenizer})
        command = [folders.program("prepare_data.py"), *paths, *document_settings(documents, source)]
        made.append(Documents(output, command, weight * documents.samples))
    return made


def _prefix(folders: Folders, phase: Phase, source: str) -> Path:
    return folders.data / f"needles-{phase.length}-{source}"


def needle_command(folders: Folders, run: Run) -> list[str]:
    """Return the command that asks a run's last checkpoint for needles."""
    length = PHASES[run.phase].length
    lengths = [length // 4, length // 2, length]
    settings = evaluation_settings(folders.run(run), folders.tokenizer, lengths, TRIALS, _output(folders, run))
    return [folders.program("needle.py"), *settings, hydra_setting("task", TASKS)]


def _output(folders: Folders, run: Run) -> Path:
    return folders.run(run) / "needle"


def save_needles(folders: Folders, run: Run) -> Path:
    """Write ROOT/results/RUN-needles.json from a finished evaluation.

    Raises:
        ConfigError: a task was not evaluated.
    """
    path = folders.needles(run)
    write_json(path, {"run": asdict(run), "tasks": {task: _found(folders, run, task) for task in TASKS}})
    return path


def _found(folders: Folders, run: Run, task: str) -> dict[str, Any]:
    """Cells of a task, and how they were measured."""
    path = _output(folders, run) / f"{file_name(task)}.json"
    results: NeedleResults | None = load_results(path)
    if results is None:
        raise ConfigError("variant", run.variant, f"{path} is missing or damaged", "Run `evaluate` again")
    cells = [
        {"length": cell.length, "depth": cell.depth, "correct": cell.correct, "trials": cell.trials}
        for cell in results.asked
    ]
    return {"cells": cells, "settings": results.settings, "environment": results.environment}
