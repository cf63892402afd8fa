"""Measure which attention blocks matter to a dense checkpoint's loss, by head.

python launch/profile_attention.py checkpoint=runs/dense output=runs/semsa/profile.npz [samples=64 verify=200 …]

Writes an .npz for launch/choose_layout.py. An interrupted command resumes when it is started again.
"""

import _surroundings  # noqa: F401 (prints why the rest can't start)

import hydra
from omegaconf import DictConfig

from s2train import config
from s2train.command_line.program import run_command, run_hydra
from s2train.environment.checks import check_process
from s2train.semsa.config import ProfileAttentionConfig, register

register()


def profile(composed: DictConfig) -> None:
    """Profile the checkpoint."""
    cfg = config.to_object(composed)
    check_process()
    from s2train.semsa.profiling import profile_checkpoint  # imports Megatron: slow

    profile_checkpoint(cfg)


@hydra.main(config_path="../conf", config_name="profile_attention", version_base="1.3")
def main(composed: DictConfig) -> None:
    """Hydra's entry."""
    run_command(lambda: profile(composed))


if __name__ == "__main__":
    run_hydra(main, ProfileAttentionConfig, __doc__)
