"""Probe how a checkpoint uses distant context.

The probes are identifiers that were defined or seen far back in held-out text.

python launch/probes.py checkpoint=runs/quality/hybrid text=runs/data/linux/held-out.jsonl
"""

import _surroundings  # noqa: F401 (prints why the rest can't start)

import hydra
from omegaconf import DictConfig

from s2train import config
from s2train.command_line.program import run_command, run_hydra
from s2train.environment.checks import check_process
from s2train.probes.config import ProbesConfig, register

register()


def probes(composed: DictConfig) -> None:
    """Run the probes."""
    cfg = config.to_object(composed)
    check_process()
    from s2train.probes.evaluate_checkpoint import evaluate  # imports Megatron: slow

    evaluate(cfg)


@hydra.main(config_path="../conf", config_name="probes", version_base="1.3")
def main(composed: DictConfig) -> None:
    """Hydra's entry."""
    run_command(lambda: probes(composed))


if __name__ == "__main__":
    run_hydra(main, ProbesConfig, __doc__)
