"""The loss of a checkpoint under masks, on samples held in memory."""

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

from s2train.kernels.layout import BlockLayout
from s2train.layouts.patterns import Pattern
from s2train.semsa.calibration import Sample, token_losses
from s2train.semsa.core_attention import set_patterns, studied_layers


@torch.no_grad()
def summed_loss(model: torch.nn.Module, texts: Sequence[Sample], device: torch.device) -> float:
    """Sum the loss on all tokens under the current masks, in nats.

    The labels are the data's.
    """
    total = 0.0
    for sample in texts:
        total += float(token_losses(model, sample, device).double().sum())
    return total


def loss_per_token(
    model: torch.nn.Module,
    layers: Sequence[Sequence[Pattern]] | None,
    texts: Sequence[Sample],
    seq_length: int,
    device: torch.device,
) -> float:
    """Return the loss per token with each head's pattern; collective.

    It is the mean over the texts of all data parallel ranks.
    """
    set_patterns(model, layers, seq_length)
    tokens = sum(float(sample["loss_mask"].sum()) for sample in texts)
    sums = torch.tensor([summed_loss(model, texts, device), tokens], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    set_patterns(model, None, seq_length)
    return float(sums[0] / sums[1])


def loss_with_head_masked(
    model: torch.nn.Module, layer: int, head: int, kept: Tensor, texts: Sequence[Sample], device: torch.device
) -> float:
    """Sum the loss with one head masked.

    The head keeps the blocks of `kept`, bool [n, n]; all other heads keep everything.
    """
    core = studied_layers(model)[layer]
    first, stop = core.heads
    masks = torch.ones(stop - first, *kept.shape, dtype=torch.bool).tril()
    if first <= head < stop:
        masks[head - first] = kept.tril()
    core.mask = BlockLayout.from_mask(masks, core.layer_layout.block_size, device=device)
    try:
        return summed_loss(model, texts, device)
    finally:
        core.mask = None
