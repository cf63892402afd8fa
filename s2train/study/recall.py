"""Thins the recall of selected blocks over training."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

_RECALL, _KL = "block_selection_recall_by_layer", "block_selection_kl_by_layer"
POINTS = 20


@dataclass(frozen=True)
class Recall:
    """Share of dense attention's probability in selected blocks, after `step` steps.

    Attributes:
        mean, lowest, highest: over layers.
        kl: the scorer's loss, mean over layers; None: it has none.
    """

    step: int
    mean: float
    lowest: float
    highest: float
    kl: float | None


def recall_curve(records: Sequence[dict[str, Any]], points: int = POINTS) -> list[Recall]:
    """Choose evenly spaced records of a metrics.jsonl, with the last one.

    There are none without block selection. Values that are not finite are left out.
    """
    measured = [(one["step"], recalls, _finite(one, _KL)) for one in records if (recalls := _finite(one, _RECALL))]
    last = len(measured)
    chosen = sorted({-(-last * number // points) - 1 for number in range(1, points + 1)}) if measured else []
    return [
        Recall(step, mean(recalls), min(recalls), max(recalls), mean(kl) if kl else None)
        for step, recalls, kl in (measured[index] for index in chosen)
    ]


def _finite(record: dict[str, Any], name: str) -> list[float]:
    return [value for value in record.get(name, {}).values() if value is not None]
