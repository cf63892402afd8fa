"""Measure a checkpoint's loss on text files and scores on lm-evaluation-harness tasks.

python launch/evaluate.py checkpoint=runs/tiny_hybrid text=held-out.jsonl
python launch/evaluate.py checkpoint=runs/tiny_hybrid text='[a.txt,b.txt]' length=8192 windows=sliding stride=1024
python launch/job.py --nproc-per-node 2 launch/evaluate.py checkpoint=runs/7b_hybrid tasks='[lambada_openai]' tp=2

Tasks need the extra `eval`, and a network for their data.
"""

import _surroundings  # noqa: F401 (prints why the rest can't start)

import hydra
from omegaconf import DictConfig

from s2train import config
from s2train.command_line.program import run_command, run_hydra
from s2train.environment.checks import check_process
from s2train.evaluation.config import EvaluateConfig, register

register()


def evaluate(composed: DictConfig) -> None:
    """Evaluate a checkpoint."""
    cfg = config.to_object(composed)
    check_process()
    from s2train.evaluation.run import evaluate as run  # imports Megatron: slow

    run(cfg)


@hydra.main(config_path="../conf", config_name="evaluate", version_base="1.3")
def main(composed: DictConfig) -> None:
    """Run Hydra's main."""
    run_command(lambda: evaluate(composed))


if __name__ == "__main__":
    run_hydra(main, EvaluateConfig, __doc__)
