"""Continue prompts with a checkpoint and print text as it is generated.

python launch/generate.py checkpoint=runs/tiny_hybrid prompt='Alice was beginning'
python launch/generate.py checkpoint=runs/tiny_hybrid prompt=file:prompts.jsonl temperature=0.8 top_p=0.95 seed=1
python launch/job.py --nproc-per-node 2 launch/generate.py checkpoint=runs/7b_hybrid tp=2 prompt='["One","Two"]'

Texts go to the standard output, everything else to the standard error.
"""

import sys

import _surroundings  # noqa: F401 (prints why the rest can't start)

import hydra
from omegaconf import DictConfig

from s2train import config
from s2train.command_line.overrides import quote_text
from s2train.command_line.program import run_command, run_hydra
from s2train.environment.checks import check_process
from s2train.generation.config import GenerateConfig, register

register()


def generate(composed: DictConfig) -> None:
    """Generate text."""
    cfg = config.to_object(composed)
    check_process()
    from s2train.generation.run import run  # imports Megatron: slow

    run(cfg)


@hydra.main(config_path="../conf", config_name="generate", version_base="1.3")
def main(composed: DictConfig) -> None:
    """Run Hydra's main."""
    run_command(lambda: generate(composed))


if __name__ == "__main__":
    sys.argv[1:] = quote_text(sys.argv[1:], "prompt")
    run_hydra(main, GenerateConfig, __doc__)
