"""Sets documents that teach retrieval, and the evaluation of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from s2train.command_line.commands import hydra_settings

DEPTHS = [n / 10 for n in range(11)]


@dataclass(frozen=True)
class Phase:
    """Training at one length.

    Attributes:
        length: tokens per document, which is one sequence.
        batch: sequences per step, in micro batches of `micro`.
        steps: steps of this phase.
        share: range of the share of a document's tokens in facts and questions.
        facts: range of the number of different keys in a document.
        questions_last: share of documents that ask only at the end, for look-ups over all distances.
        blend: names of SOURCES with their weights.
    """

    length: int
    batch: int
    micro: int
    steps: int
    share: tuple[float, float]
    facts: tuple[int, int]
    questions_last: float = 0.5
    blend: tuple[tuple[str, float], ...] = (("noise", 0.6), ("text", 0.15), ("lines", 0.25))

    @property
    def name(self) -> str:
        return f"{self.length}"

    @property
    def samples(self) -> int:
        return self.batch * self.steps


# The model learns look-ups at 512 tokens, where documents have the most of them. Longer distances are then no harder
# (see conf/model/size/needle.yaml), but the growing amount of filler is. A long document is a whole step, so these
# phases use no text: its gradients would drown those of the facts.
_FACTS_ALONE = (("noise", 0.7), ("lines", 0.3))
PHASES = (
    Phase(512, 64, 64, 7000, (0.1, 1.0), (1, 32), 0.0),
    Phase(2048, 32, 32, 400, (0.05, 1.0), (1, 64)),
    Phase(8192, 8, 8, 300, (0.02, 0.6), (1, 256)),
    Phase(32768, 4, 4, 250, (0.03, 0.3), (1, 512), 0.5, _FACTS_ALONE),
    Phase(131072, 1, 1, 250, (0.03, 0.1), (1, 512), 0.5, _FACTS_ALONE),
)
SOURCES = {
    "noise": ("needles.task=recall", "needles.haystack=noise"),
    "text": ("needles.task=recall", "needles.haystack=bundled"),
    "lines": ("needles.task=recall_lines", "needles.haystack=noise"),
}


def document_settings(phase: Phase, source: str, held_out: float = 0.0) -> list[str]:
    """Settings of launch/prepare_data.py for a source of a phase's blend.

    There are a few more documents than a run draws, and at least two in the held-out part.

    Args:
        held_out: share of the documents that no run trains on.
    """
    names = [name for name, _ in phase.blend]
    documents = int(phase.samples * dict(phase.blend)[source] * 1.01 / (1 - held_out)) + 100
    return [
        "input=needles",
        f"needles.length={phase.length}",
        f"needles.documents={documents}",
        f"needles.share={list(phase.share)}",
        f"needles.facts={list(phase.facts)}",
        f"needles.questions_last={phase.questions_last}",
        f"seed={1000 + phase.length + names.index(source)}",
        "overwrite=true",
        *SOURCES[source],
    ]


def evaluation_settings(
    checkpoint: Path, tokenizer: Path, lengths: Sequence[int], trials: int, output: Path
) -> list[str]:
    """Settings of launch/needle.py that evaluate a checkpoint at eleven depths.

    Args:
        tokenizer: the run's, where it is now: the run's settings name where it was.
        trials: at each depth.
    """
    return hydra_settings(
        {
            "checkpoint": checkpoint,
            "tokenizer": tokenizer,
            "lengths": lengths,
            "depths": DEPTHS,
            "trials": trials,
            "batch_size": trials,
            "batch_tokens": 131072,
            "output": output,
        }
    )
