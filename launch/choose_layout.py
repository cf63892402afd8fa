"""Choose each head's attention pattern by a profile, under a budget.

python launch/choose_layout.py profile=runs/semsa/profile.npz output=runs/semsa/chosen.yaml density=0.25

Writes a layout for layout=file:…, with its picture and figures. Needs neither GPU nor torchrun.
"""

import _surroundings  # noqa: F401 (prints why the rest can't start)

import hydra
from omegaconf import DictConfig

from s2train import config
from s2train.command_line.program import run_command, run_hydra
from s2train.semsa.choosing import choose_layout
from s2train.semsa.config import ChooseLayoutConfig, register

register()


@hydra.main(config_path="../conf", config_name="choose_layout", version_base="1.3")
def main(composed: DictConfig) -> None:
    """Hydra's entry."""
    run_command(lambda: choose_layout(config.to_object(composed)))


if __name__ == "__main__":
    run_hydra(main, ChooseLayoutConfig, __doc__)
