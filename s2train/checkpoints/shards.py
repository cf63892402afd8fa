"""Loads Megatron's shards of a checkpoint."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from torch.distributed.checkpoint.api import CheckpointException

from s2train.checkpoints.folders import remedy_for_damage
from s2train.checkpoints.integrity import damage, later_megatron, later_torch
from s2train.checkpoints.optimizer_state_conversion import load_without_foreign_extra_state
from s2train.checkpoints.shard_index import saved_entries
from s2train.errors import ConfigError, first_line


def load_shards(
    state: dict[str, Any], checkpoint: Path, setting: str = "checkpoint", entries: Collection[str] | None = None
) -> dict[str, Any]:
    """Load a sharded state dict through Megatron.

    Args:
        entries: what `readable_entries` returned; None: not called yet.
    Raises:
        ConfigError: the checkpoint's shards are damaged, or a later torch or megatron-core wrote them.
    """
    known = readable_entries(checkpoint, setting) if entries is None else entries
    try:
        return load_without_foreign_extra_state(state, checkpoint, known)
    except (Exception, CheckpointException) as error:  # a missing or truncated file raises many types
        problem = damage(checkpoint) or f"its shards can't be loaded ({first_line(error)})"
        raise ConfigError(setting, checkpoint, problem, remedy_for_damage(checkpoint, setting)) from error


def readable_entries(checkpoint: Path, setting: str = "checkpoint") -> set[str]:
    """Return the names of a checkpoint's saved tensors and objects.

    Raises:
        ConfigError: the index is damaged, or the installed torch or megatron-core can't read what a later one wrote.
    """
    try:
        entries = saved_entries(checkpoint)
        problem = later_megatron(checkpoint, entries)
    except Exception as error:  # unpickling damaged bytes can raise any exception
        if (problem := later_torch(error)) is None:
            reason = f"its index .metadata can't be read ({type(error).__name__})"
            raise ConfigError(setting, checkpoint, reason, remedy_for_damage(checkpoint, setting)) from error
    if problem is not None:
        remedy = (
            "Install that version; or, for the weights alone, run launch/export.py with that version and"
            " launch/import.py with this one"
        )
        raise ConfigError(setting, checkpoint, problem, remedy)
    return entries


def sharding_metadata() -> dict[str, Any]:
    """Metadata of a shard layout that any number of ranks can load."""
    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",
    }
