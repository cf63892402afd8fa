"""Trains as launch/pretrain.py does, with a stand-in for transformer-engine where S2TRAIN_TEST_FAKE_TE is 1."""

import os
import sys

from s2train.command_line.program import run_command
from s2train.environment.hardware import detect_own
from s2train.planning import compose_run, preview
from tests.forked import FAKE_TE
from tests.megatron import fake_transformer_engine


def main() -> None:
    """One run."""
    cfg = compose_run(sys.argv[1:])
    # Not `check`: it rejects transformer-engine on a CPU.
    plan = preview(cfg, int(os.environ.get("WORLD_SIZE", "1")), detect_own())
    from s2train.training.run import run

    run(cfg, plan)


if __name__ == "__main__":
    if os.environ.get(FAKE_TE) == "1" and "transformer_engine" not in sys.modules:
        fake_transformer_engine.install()
    run_command(main)
