"""Settings of `launch/show_layout.py`."""

from dataclasses import dataclass

from s2train import config
from s2train.config import PretrainConfig


@dataclass
class ShowLayoutConfig(PretrainConfig):
    """A run of `launch/show_layout.py`: the settings of the run to show."""

    seq_length: int | None = None  # tokens; None: train.seq_length
    layers: list[int] | None = None  # layers whose block masks to draw; None: the first of each distinct sparse layer
    output: str = "runs/layouts/${model.name}"  # folder of layout.png and layout.json


def register() -> None:
    """Register this schema with Hydra."""
    config.register({"show_layout": ShowLayoutConfig})
