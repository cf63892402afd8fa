"""Compare chosen layouts with others: held-out loss against density, without further training.

python launch/layout_frontier.py checkpoint=runs/dense profile=runs/semsa/profile.npz output=runs/semsa/frontier.json

Writes a JSON file and a picture.
"""

import _surroundings  # noqa: F401 (prints why the rest can't start)

import hydra
from omegaconf import DictConfig

from s2train import config
from s2train.command_line.program import run_command, run_hydra
from s2train.environment.checks import check_process
from s2train.semsa.config import FrontierConfig, register

register()


def frontier(composed: DictConfig) -> None:
    """Measure the frontier."""
    cfg = config.to_object(composed)
    check_process()
    from s2train.semsa.frontier import measure_frontier  # imports Megatron: slow

    measure_frontier(cfg)


@hydra.main(config_path="../conf", config_name="layout_frontier", version_base="1.3")
def main(composed: DictConfig) -> None:
    """Hydra's entry."""
    run_command(lambda: frontier(composed))


if __name__ == "__main__":
    run_hydra(main, FrontierConfig, __doc__)
