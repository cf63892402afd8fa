"""Settings of `launch/export.py` and `launch/import.py`."""

from dataclasses import dataclass

from omegaconf import MISSING

from s2train import config


@dataclass
class ExportConfig:
    """A run of `launch/export.py`."""

    checkpoint: str = MISSING  # a run folder, its checkpoints folder, or one iter_* in it
    output: str = MISSING  # folder to create
    vocab_size: int | None = None  # rows of the embedding to export, if it was padded; None: all
    tokenizer: str | None = None  # new path of the run's tokenizer.json if it was moved; None: the run's own


@dataclass
class ImportConfig:
    """A run of `launch/import.py`."""

    weights: str = MISSING  # folder with config.json and .safetensors of a Llama, Qwen3 or an export
    output: str = MISSING  # run folder to create, for checkpoint.resume
    vocab_size: int | None = None  # rows of the embedding; further rows are zero; None: those of the weights
    precision: str = "bf16"  # precision of the saved weights: bf16, fp32
    # folder of configuration groups to write the run's settings to, as model/imported/NAME.yaml; None: conf/
    conf: str | None = None


def register() -> None:
    """Register these schemas with Hydra."""
    config.register({"export": ExportConfig, "import": ImportConfig})
