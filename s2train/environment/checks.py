"""Checks a process's surroundings before it imports Megatron."""

from s2train.distributed.rendezvous import check_ranks
from s2train.environment.apex import apex_available
from s2train.environment.hardware import check_gpus


def check_process() -> None:
    """Check ranks' variables, GPUs, and that a package apex is NVIDIA's.

    Raises:
        ConfigError: see `check_ranks`, `check_gpus` and `apex_available`.
    """
    check_ranks()
    check_gpus()
    apex_available()  # rejects another package named apex, which Megatron would import
