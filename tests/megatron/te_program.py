"""Trains as launch/pretrain.py does, with a stand-in for transformer-engine where the first argument is "fake"."""

import os
import sys

from s2train.command_line.program import run_command
from s2train.environment.hardware import detect_own
from s2train.planning import compose_run, preview
from tests.megatron import fake_transformer_engine


def main() -> None:
    """One run."""
    cfg = compose_run(sys.argv[2:])
    # Not `check`: it refuses transformer-engine on a CPU.
    plan = preview(cfg, int(os.environ.get("WORLD_SIZE", "1")), detect_own())
    from s2train.training.run import run

    run(cfg, plan)


if __name__ == "__main__":
    if sys.argv[1] == "fake":
        fake_transformer_engine.install()
    run_command(main)
