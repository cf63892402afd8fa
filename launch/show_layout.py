"""Show a layout before training it.

python launch/show_layout.py +model=7b_hybrid [layout=… seq_length=131072 …]

Takes the settings of launch/pretrain.py, and `seq_length`, `layers=[0,1]` (layers whose masks to draw) and `output`.
Prints coverage, reachability and costs; writes layout.png and layout.json. Needs neither GPU nor torchrun.
"""

import _surroundings  # noqa: F401 (prints why the rest can't start)

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from s2train.command_line.composition import CONF, config_groups
from s2train.command_line.program import run_command, run_hydra
from s2train.planning import resolve
from s2train.planning.config import ShowLayoutConfig, register
from s2train.planning.show import show

register()
MODELS = config_groups(CONF)["model"]


@hydra.main(config_path="../conf", config_name="show_layout", version_base="1.3")
def main(composed: DictConfig) -> None:
    """Run Hydra's main."""
    run_command(lambda: show(resolve(composed, MODELS, HydraConfig.get().overrides.task)))


if __name__ == "__main__":
    run_hydra(main, ShowLayoutConfig, __doc__)
