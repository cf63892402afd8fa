"""Settings of `launch/probes.py`."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from s2train import config


@dataclass
class ProbesConfig:
    """A run of `launch/probes.py`."""

    checkpoint: str = MISSING  # a run folder, its checkpoints folder, or one iter_* in it
    text: str = MISSING  # held-out documents: JSON lines or any other input of launch/prepare_data.py
    text_key: str = "text"  # what a line's or a table's documents are called
    tokenizer: str | None = None  # where the run's tokenizer.json was moved to; None: the run's own
    # tokens of a prompt and its answer; the definition stands in the first 30 % of them
    lengths: list[int] = field(default_factory=lambda: [1024, 4096, 16384])
    trials: int = 100  # identifiers completed per length; fewer where the text holds fewer
    batch_size: int = 8  # sequences decoded together
    sequences: int = 32  # of the longest length, for the loss on second occurrences
    seed: int = 1234  # of the choice of identifiers and sequences
    output: str | None = None  # JSON file; None: `probes.json` in the run folder
    overwrite: bool = False
    attention_backend: str = "auto"  # sparse layers, as in a run
    tp: int = 1  # tensor model parallel: the number of started processes


def register() -> None:
    """Register this schema with Hydra."""
    config.register({"probes": ProbesConfig})
