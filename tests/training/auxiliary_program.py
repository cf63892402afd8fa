"""Computes the gradients of scorers in steps with masked tokens, on one process; prints JSON."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from s2train.config import LayoutConfig, ModelConfig, ParallelConfig, PretrainConfig, TrainConfig
from s2train.megatron.core_attention import cores_of
from s2train.megatron.setup import initialize, shutdown
from s2train.planning import hybrid_layout
from s2train.training.auxiliary_losses import AuxiliaryLosses
from s2train.training.batches import Batch, EarlyBatches
from s2train.training.steps import run_step
from tests.attention.conformance_program import BLOCK, LENGTH, VOCABULARY, build

SEQUENCES = 4
TOKENS = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1))
MASKS = {
    "every token": torch.ones(SEQUENCES, LENGTH),
    "few tokens": (torch.arange(LENGTH) > 0.9 * LENGTH).float().expand(SEQUENCES, LENGTH),
    "one sequence": torch.eye(SEQUENCES, LENGTH)[:, :1].expand(SEQUENCES, LENGTH),
}


def config(micro_batch_size: int) -> PretrainConfig:
    kind = {"kind": "block_selection", "scorer": "index", "sinks": 0, "top_k": 1}
    return PretrainConfig(
        model=ModelConfig("masked", 2, 32, 48, 4, 2, vocab_size=VOCABULARY, init_std=0.2),
        layout=LayoutConfig("B", BLOCK, kinds={"B": kind}),
        parallel=ParallelConfig(),
        train=TrainConfig(
            steps=1,
            seq_length=LENGTH,
            global_batch_size=SEQUENCES,
            micro_batch_size=micro_batch_size,
            precision="fp32",
        ),
    )


def batches(mask: Tensor, size: int) -> Iterator[Batch]:
    positions = torch.arange(LENGTH).expand(SEQUENCES, LENGTH)
    whole = {"tokens": TOKENS[:, :-1], "labels": TOKENS[:, 1:], "loss_mask": mask, "position_ids": positions}
    for first in range(0, SEQUENCES, size):
        yield {name: values[first : first + size].contiguous() for name, values in whole.items()}


def gradients(mask: Tensor, size: int) -> list[float]:
    """Gradients of the scorers' weights, by which they are stepped."""
    torch.manual_seed(1)
    cfg = config(size)
    chunks: list[Any] = [build(replace(cfg, seed=1))]
    losses, early = AuxiliaryLosses(cfg, hybrid_layout(cfg), chunks), EarlyBatches(batches(mask, size))
    losses.begin_step(1, is_logged=False, batch=SEQUENCES, batches=early)
    run_step(cfg, chunks, [early], forward_only=False, batch_size=SEQUENCES)
    weights = [getattr(core, weight.name) for core in cores_of(*chunks) for weight in core.own_weights]
    return (torch.cat([weight.grad.flatten() for weight in weights]) / mask.mean()).tolist()


def main() -> None:
    initialize(ParallelConfig(), 1)
    found = {name: {size: gradients(mask, size) for size in (1, 2, 4)} for name, mask in MASKS.items()}
    shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
