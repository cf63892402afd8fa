"""Saves and restores this rank's random number generators.

Today's models draw nothing from them in a step (no dropout). They are saved so that a resumed run would continue
identically if a model did.
"""

import random
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

from s2train.command_line.messages import warn


def current_rng_ranks() -> list[int]:
    """Number of ranks with separate generator states, as [tp, pp].

    Ranks that differ only in data or context parallel rank share their generators' states.
    """
    return [
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    ]


def sharded_rng() -> ShardedObject:
    """Generator states as an entry of a sharded state dict."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 (Megatron's datasets and others draw from it)
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject(
        "rng",
        states,
        tuple(current_rng_ranks()),
        (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()),
        replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )


def set_rng(states: dict[str, Any]) -> None:
    """Restore loaded generator states.

    If a GPU's run continues on a CPU, or the reverse, its device generators keep their state, with one warning: the
    states of the two don't fit each other.
    """
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"].shape != torch.cuda.get_rng_state().shape:
        warn("the checkpoint is another device's: the device's random number generators aren't restored")
        return
    torch.cuda.set_rng_state(states["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
