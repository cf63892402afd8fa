"""Stores needle results in one JSON file per task.

Writes cell by cell; a rerun resumes from the file.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from s2train.checkpoints.listing import is_checkpoint_name
from s2train.config import PretrainConfig
from s2train.files import write_json
from s2train.needles.config import NeedleConfig
from s2train.needles.scores import RULER_THRESHOLD, Score, effective_length

_END_BYTES = 1 << 16  # of each end of a shard, for its fingerprint

TITLES = {
    "single": "Needle retrieval",
    "multi": "Several needles",
    "key_value": "Key-value retrieval",
    "variable_tracking": "Variable tracking",
}


@dataclass(frozen=True)
class CellReach:
    """Number of layers that carry a cell's needle to its question.

    -1 means that no number of layers is enough.

    Attributes:
        from_first: counted from the first layer: after that many layers the question's end can know the needle.
        from_last: counted back from the last layer: the needle must be read that early at the latest.
        direct_heads: number of the model's `heads`, in all layers together, that see the whole needle from the
            question's end in one hop; at least one of them must learn to look it up. None in older files.
    """

    from_first: int
    from_last: int
    direct_heads: int | None = None
    heads: int | None = None


@dataclass(frozen=True)
class Cell:
    """Results for one length (tokens) and depth of the grid.

    Attributes:
        correct: trials whose whole answer matched.
        token_accuracy: share of answer tokens that matched, over all trials.
        character_accuracy: share of the answers' letters and digits at their positions in the decoded text.
        reach: None if the layout is not known.
        seconds: time of the cell's trials; None in older files.
        values_found, values: values of the answers that the decoded text contains, and all of them, over all trials:
            RULER's score. None in older files.
    """

    length: int
    depth: float
    correct: int
    trials: int
    token_accuracy: float
    character_accuracy: float
    reach: CellReach | None = None
    seconds: float | None = None
    values_found: int | None = None
    values: int | None = None

    @property
    def score(self) -> Score:
        return Score(self.correct, self.trials)

    @property
    def contained(self) -> Score | None:
        """Score by contained values instead of exact answers."""
        return None if self.values_found is None or self.values is None else Score(self.values_found, self.values)


@dataclass
class NeedleResults:
    """Results of an evaluation, finished or not.

    Attributes:
        checkpoint, step: the evaluated checkpoint.
        settings: everything that determines a cell's outcome besides its length and depth; plain JSON values.
        lengths, depths: the requested grid.
        cells: cells known so far; earlier runs may have left cells outside the requested grid.
        threshold: threshold of `effective_length`.
        command, environment: command line of the last run that evaluated a cell, and its `s2train.environment`; None in
            older files. Cells don't depend on them.
    """

    checkpoint: str
    step: int
    settings: dict[str, Any]
    lengths: list[int]
    depths: list[float]
    cells: list[Cell] = field(default_factory=list)
    threshold: float = RULER_THRESHOLD
    command: str | None = None
    environment: dict[str, Any] | None = None

    @property
    def asked(self) -> list[Cell]:
        """Known cells of the requested grid."""
        return [cell for cell in self.cells if cell.length in self.lengths and cell.depth in self.depths]

    @property
    def score(self) -> Score | None:
        """Score over `asked`; None if that is empty."""
        return _sum(self.asked)

    @property
    def contained(self) -> Score | None:
        """Score by contained values over `asked`; None if a cell lacks it."""
        return _sum_contained(self.asked)

    @property
    def columns(self) -> list[tuple[int, Score]]:
        """Lengths whose depths are all known, shortest first, with their scores."""
        return [(length, score) for length, cells in self._whole_columns() if (score := _sum(cells)) is not None]

    @property
    def contained_columns(self) -> list[tuple[int, Score]]:
        """Like `columns`, with scores by contained values; without lengths that lack them."""
        columns = self._whole_columns()
        return [(length, score) for length, cells in columns if (score := _sum_contained(cells)) is not None]

    @property
    def effective_length(self) -> int | None:
        """Effective length of `columns`; see `s2train.needles.scores.effective_length`."""
        return effective_length(self.columns, self.threshold)

    def _whole_columns(self) -> list[tuple[int, list[Cell]]]:
        found = [(length, [cell for cell in self.asked if cell.length == length]) for length in sorted(self.lengths)]
        return [(length, cells) for length, cells in found if len(cells) == len(self.depths)]

    def add(self, cell: Cell) -> None:
        """Add a cell, or replace the one in its place."""
        others = [c for c in self.cells if (c.length, c.depth) != (cell.length, cell.depth)]
        self.cells = sorted([*others, cell], key=lambda c: (c.length, c.depth))

    def save(self, path: Path) -> None:
        """Write as JSON.

        After an interruption, either the old or the new file exists.
        """
        content = {
            "total": self.score and self.score.as_json(),
            "effective_length": self.effective_length,
            "columns": [{"length": length, **score.as_json()} for length, score in self.columns],
            "contains": self._contained_json(),
            **asdict(self),
            "cells": [asdict(cell) | cell.score.as_json() for cell in self.cells],
        }
        write_json(path, content)

    def _contained_json(self) -> dict[str, object] | None:
        """RULER's score, as JSON; None if a cell lacks it."""
        if (total := self.contained) is None:
            return None
        columns = self.contained_columns
        return {
            "values_found": total.correct,
            "values": total.trials,
            "score": total.share,
            "effective_length": effective_length(columns, self.threshold),
            "columns": [{"length": length, "score": score.share} for length, score in columns],
        }


def load_results(path: Path) -> NeedleResults | None:
    """Read a file of `NeedleResults.save`.

    Returns None if it is missing or another file.
    """
    try:
        return results_from(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def results_from(content: dict[str, Any]) -> NeedleResults:
    """Build results from JSON; fields with defaults may be missing.

    Raises:
        KeyError, TypeError: a field is missing or unknown.
    """
    cells = [_cell(cell) for cell in content["cells"]]
    return NeedleResults(**_own(NeedleResults, content) | {"cells": cells})


def _sum(cells: list[Cell]) -> Score | None:
    return Score(sum(cell.correct for cell in cells), sum(cell.trials for cell in cells)) if cells else None


def _sum_contained(cells: list[Cell]) -> Score | None:
    scores = [cell.contained for cell in cells]
    known = [score for score in scores if score is not None]
    if not known or len(known) < len(scores):
        return None
    return Score(sum(score.correct for score in known), sum(score.trials for score in known))


def _cell(content: dict[str, Any]) -> Cell:
    own = _own(Cell, content)
    reach = own.pop("reach", None)
    return Cell(**own, reach=CellReach(**reach) if reach else None)


def _own(kind: type[NeedleResults] | type[Cell], content: dict[str, Any]) -> dict[str, Any]:
    """Entries of `content` that are fields of `kind`."""
    return {entry.name: content[entry.name] for entry in fields(kind) if entry.name in content}


def file_name(task: str) -> str:
    """Name of a task's JSON and PNG files, without suffix."""
    return "needle" if task == "single" else f"needle-{task}"


def output_folder(cfg: NeedleConfig) -> Path:
    """Folder for results.

    `needle` in the run folder, or a subfolder for a named iteration.
    """
    if cfg.output is not None:
        return Path(cfg.output)
    checkpoint = Path(cfg.checkpoint)
    iteration = checkpoint.name if is_checkpoint_name(checkpoint.name) else ""
    run = checkpoint.parent if iteration else checkpoint
    run = run.parent if run.name == "checkpoints" else run
    return run / "needle" / iteration


def layout_fingerprint(trained: PretrainConfig) -> str:
    """Fingerprint of a run's attention layout and rotation."""
    model = trained.model
    layout = [asdict(trained.layout), asdict(trained.schedule), model.rotary_base, model.rotary_percent]
    if model.rope_scaling.kind != "none":  # results of models without it keep their fingerprints
        layout.append(asdict(model.rope_scaling))
    return hashlib.sha256(json.dumps(layout, sort_keys=True).encode()).hexdigest()[:16]


def weights_fingerprint(checkpoint: Path) -> str:
    """Fingerprint of a checkpoint's weights.

    Hashes the shards' names, lengths, and first and last 64 KiB. It is the same for any number of ranks that read the
    checkpoint, and another one if another number of ranks saved the same weights. It prevents cells of an earlier
    training in the same folder from being reused. Two steps of a frozen trunk may share it: what a kind of attention
    learns can lie between the ends.
    """
    digest = hashlib.sha256()
    for shard in sorted(checkpoint.glob("*.distcp")):
        size = shard.stat().st_size
        digest.update(f"{shard.name} {size}\n".encode())
        with shard.open("rb") as file:
            digest.update(file.read(_END_BYTES))
            file.seek(max(0, size - _END_BYTES))
            digest.update(file.read(_END_BYTES))
    return digest.hexdigest()[:16]
