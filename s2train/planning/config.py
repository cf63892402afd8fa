"""Settings of `launch/show_layout.py`."""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore

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
    config.register()
    ConfigStore.instance().store(name="show_layout_schema", node=ShowLayoutConfig)
