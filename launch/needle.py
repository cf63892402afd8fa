"""Score a checkpoint's needle retrieval over length and depth.

python launch/needle.py checkpoint=runs/tiny_hybrid
python launch/job.py --nproc-per-node 8 launch/needle.py checkpoint=runs/7b_hybrid tp=2 trials=100 \\
    lengths=[8192,32768] 'task=[single,multi,key_value,variable_tracking]'

After an interruption, the same command resumes.
"""

import _surroundings  # noqa: F401 (prints why the rest can't start)

import hydra
from omegaconf import DictConfig

from s2train import config
from s2train.command_line.program import run_command, run_hydra
from s2train.environment.checks import check_process
from s2train.needles.config import NeedleConfig, register

register()


def needle(composed: DictConfig) -> None:
    """Evaluate a checkpoint."""
    cfg = config.to_object(composed)
    check_process()
    from s2train.needles.evaluate_checkpoint import evaluate  # imports Megatron: slow

    evaluate(cfg)


@hydra.main(config_path="../conf", config_name="needle", version_base="1.3")
def main(composed: DictConfig) -> None:
    """Run Hydra's main."""
    run_command(lambda: needle(composed))


if __name__ == "__main__":
    run_hydra(main, NeedleConfig, __doc__)
