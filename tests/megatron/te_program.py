"""Trains as launch/pretrain.py does, with a stand-in for transformer-engine where the first argument is "fake"."""

import os
import sys

from hydra import compose, initialize_config_dir

from s2train import config
from s2train.command_line import run_command
from s2train.hardware import detect_own
from s2train.planning import preview, resolve
from tests.megatron import fake_transformer_engine
from tests.program import ROOT


def main() -> None:
    """One run."""
    config.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = resolve(compose("pretrain", sys.argv[2:]), [])
    # Not `check`: it refuses transformer-engine on a CPU.
    plan = preview(cfg, int(os.environ.get("WORLD_SIZE", "1")), detect_own())
    from s2train.training.run import run

    run(cfg, plan)


if __name__ == "__main__":
    if sys.argv[1] == "fake":
        fake_transformer_engine.install()
    run_command(main)
