"""Pretrain: `torchrun --nproc-per-node N launch/pretrain.py +model=tiny_hybrid [setting=value …]`.

Settings: s2train/config.py; named values: conf/. `plan=true` prints what the run would cost and builds nothing.
"""

import hydra
from omegaconf import DictConfig

from s2train import config
from s2train.command_line import run_command

config.register()


@hydra.main(config_path="../conf", config_name="pretrain", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Hydra's entry."""
    from s2train.training.run import pretrain  # after Hydra has judged the command line: this import is slow

    run_command(cfg, pretrain)


# Saving starts processes, which import this file again.
if __name__ == "__main__":
    main()
