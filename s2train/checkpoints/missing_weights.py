"""Loads checkpoints that lack weights of the model's kinds of attention."""

from collections.abc import Collection, Sequence
from typing import Any

import torch

from s2train.megatron.core_attention import CausalCoreAttention
from s2train.megatron.model import unwrap


def leave_out_missing(
    wanted: dict[str, Any], chunks: Sequence[Any], entries: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Remove wanted shards that the checkpoint lacks, and may lack.

    Args:
        wanted: sharded state of each chunk, by its name, in the chunks' order; changed in place.
        entries: names of the checkpoint's tensors and objects.
    Returns:
        for each chunk its initial values of the weights left out, by name.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in wanted}
    cores = {
        name: [(path, m) for path, m in unwrap(chunk).named_modules() if isinstance(m, CausalCoreAttention)]
        for name, chunk in zip(wanted, chunks, strict=True)
    }
    if not any(core.own_weights for of_chunk in cores.values() for _, core in of_chunk):
        return found
    keys = {name.split("/shard_")[0] for name in entries}
    for name, of_chunk in cores.items():
        for path, core in of_chunk:
            for weight in core.own_weights:
                entry = f"{path}.{weight.name}"
                if wanted[name][entry].key in keys or not weight.may_be_missing:
                    continue
                del wanted[name][entry]
                parameter: torch.Tensor = getattr(core, weight.name)
                found[name][entry] = parameter.detach().clone()
    return found
