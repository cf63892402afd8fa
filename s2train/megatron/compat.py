"""All differences between megatron-core 0.16 and 0.19, and nothing else."""

import inspect
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.utils import get_batch_on_this_cp_rank

_TAKES_HYBRID_CP = "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters


def slice_batch_for_context_parallel(
    batch: dict[str, torch.Tensor], cp_group: torch.distributed.ProcessGroup
) -> dict[str, torch.Tensor]:
    """Return this rank's zig-zag part of a batch of tensors [b, s].

    0.19 requires the argument `is_hybrid_cp`, and treats `cp_group=None` as the whole world.
    """
    if _TAKES_HYBRID_CP:
        return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=cp_group)
    return get_batch_on_this_cp_rank(batch, cp_group=cp_group)


def save_checkpoint_shards(
    state: dict[str, Any], folder: str, metadata: dict[str, str], *, in_background: bool
) -> AsyncRequest | None:
    """Write a sharded state dict, or return the request to.

    Without an explicit strategy, 0.19 would pick one that needs nvidia-resiliency-ext.
    """
    extra = {}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        extra["async_strategy"] = "mcore"
    return dist_checkpointing.save(state, folder, content_metadata=metadata, async_sharded_save=in_background, **extra)


def gradients_for_norm(part: Any) -> list[torch.Tensor]:
    """Return the prepared gradients that this rank counts in the norm."""
    if hasattr(part, "get_grads_for_grad_norm"):  # its name since 0.19
        return part.get_grads_for_grad_norm()
    return part.get_main_grads_for_grad_norm()
