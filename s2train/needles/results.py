"""What a needle evaluation leaves behind: a JSON file a task, written cell by cell; a rerun goes on from it."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from s2train.config import NeedleConfig, PretrainConfig
from s2train.files import replacing
from s2train.needles.scores import RULER_THRESHOLD, Score, effective_length

_ENDS = 1 << 16  # bytes

TITLES = {
    "single": "Needle retrieval",
    "multi": "Several needles",
    "key_value": "Key-value retrieval",
    "variable_tracking": "Variable tracking",
}


@dataclass(frozen=True)
class CellReach:
    """Through how many layers the layout carries a cell's needle to its question; -1: through none.

    Attributes:
        from_first: counted from the model's first layer on: from there the question's end can know the needle.
        from_last: counted back from the last one: how early the needle has to be read at the latest.
        direct_heads: how many of the model's `heads`, all layers' together, see all of it from the question's end in
            one hop: of so many at least one must have learned to look it up. None in files that don't tell.
    """

    from_first: int
    from_last: int
    direct_heads: int | None = None
    heads: int | None = None


@dataclass(frozen=True)
class Cell:
    """One length (tokens) and depth of the grid.

    Attributes:
        correct: trials whose whole answer matched.
        token_accuracy: share of answer tokens that matched, over all trials.
        character_accuracy: share of the answers' letters and digits that stand in their places in the decoded text.
        reach: None where the layout is not known.
        seconds: that its trials took; None in files that don't tell.
        values_found, values: of the values that the answers name so many stood in the decoded text, of so many in all
            trials: RULER's score. None in files that don't tell.
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
        """Of values, not answers."""
        return None if self.values_found is None or self.values is None else Score(self.values_found, self.values)


@dataclass
class NeedleResults:
    """An evaluation, finished or not.

    Attributes:
        checkpoint, step: what is evaluated.
        settings: all that a cell's outcome depends on beside its length and depth; plain JSON values.
        lengths, depths: the grid asked for.
        cells: those known so far; a run on another grid may have left more than are asked for.
        threshold: of `effective_length`.
        command, environment: of the last run that evaluated a cell, as typed and as `s2train.environment` tells it;
            None in files that don't tell. No cell's outcome is taken to depend on them.
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
        """The cells known so far of the grid asked for."""
        return [cell for cell in self.cells if cell.length in self.lengths and cell.depth in self.depths]

    @property
    def score(self) -> Score | None:
        """Over `asked`; None if that is empty."""
        return _sum(self.asked)

    @property
    def contained(self) -> Score | None:
        """Values that the decoded text contains, over `asked`; None if a cell doesn't tell."""
        return _sum_contained(self.asked)

    @property
    def columns(self) -> list[tuple[int, Score]]:
        """Lengths of which all depths are known, short ones first, and their scores."""
        return [(length, score) for length, cells in self._whole_columns() if (score := _sum(cells)) is not None]

    @property
    def contained_columns(self) -> list[tuple[int, Score]]:
        """As `columns`, of `contained`; without lengths of which a cell doesn't tell."""
        columns = self._whole_columns()
        return [(length, score) for length, cells in columns if (score := _sum_contained(cells)) is not None]

    @property
    def effective_length(self) -> int | None:
        """Of `columns`; see `s2train.needles.scores.effective_length`."""
        return effective_length(self.columns, self.threshold)

    def _whole_columns(self) -> list[tuple[int, list[Cell]]]:
        found = [(length, [cell for cell in self.asked if cell.length == length]) for length in sorted(self.lengths)]
        return [(length, cells) for length, cells in found if len(cells) == len(self.depths)]

    def add(self, cell: Cell) -> None:
        """Put a cell in, in place of an older one of the same length and depth."""
        others = [c for c in self.cells if (c.length, c.depth) != (cell.length, cell.depth)]
        self.cells = sorted([*others, cell], key=lambda c: (c.length, c.depth))

    def save(self, path: Path) -> None:
        """Write as JSON; an interruption leaves the old file or the new one."""
        content = {
            "total": self.score and self.score.as_json(),
            "effective_length": self.effective_length,
            "columns": [{"length": length, **score.as_json()} for length, score in self.columns],
            "contains": self._contained_json(),
            **asdict(self),
            "cells": [asdict(cell) | cell.score.as_json() for cell in self.cells],
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _contained_json(self) -> dict[str, object] | None:
        """RULER's score, beside the strict one; None if a cell doesn't tell."""
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
    """Read what `NeedleResults.save` wrote; None if there is no such file, or it is none of ours."""
    try:
        return results_from(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def results_from(content: dict[str, Any]) -> NeedleResults:
    """Of the JSON that holds their fields; those that have defaults may be missing.

    Raises:
        KeyError, TypeError: it holds others.
    """
    cells = [_cell(cell) for cell in content["cells"]]
    return NeedleResults(**_own(NeedleResults, content) | {"cells": cells})


def _sum(cells: list[Cell]) -> Score | None:
    return Score(sum(cell.correct for cell in cells), sum(cell.trials for cell in cells)) if cells else None


def _sum_contained(cells: list[Cell]) -> Score | None:
    scores = [cell.contained for cell in cells]
    told = [score for score in scores if score is not None]
    if not told or len(told) < len(scores):
        return None
    return Score(sum(score.correct for score in told), sum(score.trials for score in told))


def _cell(content: dict[str, Any]) -> Cell:
    own = _own(Cell, content)
    reach = own.pop("reach", None)
    return Cell(**own, reach=CellReach(**reach) if reach else None)


def _own(kind: type[NeedleResults] | type[Cell], content: dict[str, Any]) -> dict[str, Any]:
    """What `content` holds of the fields of `kind`."""
    return {entry.name: content[entry.name] for entry in fields(kind) if entry.name in content}


def file_name(task: str) -> str:
    """Of a task's JSON and PNG, without the suffix."""
    return "needle" if task == "single" else f"needle-{task}"


def output_folder(cfg: NeedleConfig) -> Path:
    """Where results go: `needle` in the run folder; for one named iteration, a folder of its own in there."""
    if cfg.output is not None:
        return Path(cfg.output)
    checkpoint = Path(cfg.checkpoint)
    iteration = checkpoint.name if checkpoint.name.startswith("iter_") else ""
    run = checkpoint.parent if iteration else checkpoint
    run = run.parent if run.name == "checkpoints" else run
    return run / "needle" / iteration


def layout_fingerprint(trained: PretrainConfig) -> str:
    """Tells what a run's attention keeps, and how it rotates, from what another's would with the same weights."""
    told = [asdict(trained.layout), asdict(trained.schedule), trained.model.rotary_base, trained.model.rotary_percent]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def weights_fingerprint(checkpoint: Path) -> str:
    """Tells a checkpoint's weights from others, however many ranks read them, so that cells of an earlier training in
    the same folder are not taken for this one's: of the shards' names, lengths, and first and last 64 KiB."""
    digest = hashlib.sha256()
    for shard in sorted(checkpoint.glob("*.distcp")):
        size = shard.stat().st_size
        digest.update(f"{shard.name} {size}\n".encode())
        with shard.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read(_ENDS))
    return digest.hexdigest()[:16]
