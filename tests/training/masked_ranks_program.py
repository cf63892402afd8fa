"""Computes a step's gradients where each rank has another number of masked tokens; prints them as JSON.

Arguments: the seed of tokens, the run's division, and the micro batch's size.
"""

import json
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from s2train.config import DataConfig, LayoutConfig, ModelConfig, ParallelConfig, PretrainConfig, TrainConfig
from s2train.megatron.layer_backends import choose_backend
from s2train.megatron.model import build_model, transformer_config
from s2train.megatron.setup import initialize, shutdown
from s2train.planning import hybrid_layout
from s2train.training.auxiliary_losses import AuxiliaryLosses
from s2train.training.batches import EarlyBatches, micro_batches
from s2train.training.optimizer import wrap_data_parallel
from s2train.training.steps import run_step

LENGTH, BLOCK, VOCABULARY = 64, 16, 64
COUNTED = (range(LENGTH), range(0), range(LENGTH), range(5, 6))  # of each sequence: the second rank has one token
KINDS = {
    "E": {"scorer": "sea", "features": 8, "channels": 4, "mse_weight": 1.0},
    "I": {"scorer": "index", "trunk_gradient": True},  # the trunk learns from both losses
}


def config(parallel: ParallelConfig, micro_batch_size: int) -> PretrainConfig:
    common = {"kind": "block_selection", "top_k": 1, "sinks": 0, "sampled_rows": 16, "loss_weight": 1.0}
    return PretrainConfig(
        model=ModelConfig("masked", 2, 32, 48, 4, 2, vocab_size=VOCABULARY, init_std=0.2, qk_norm=True),
        layout=LayoutConfig("EI", BLOCK, kinds={letter: common | own for letter, own in KINDS.items()}),
        parallel=parallel,
        data=DataConfig(num_workers=0),
        train=TrainConfig(
            steps=1,
            seq_length=LENGTH,
            global_batch_size=len(COUNTED),
            micro_batch_size=micro_batch_size,
            precision="fp32",
        ),
    )


class Sequences(Dataset):
    """Random tokens, of which few count."""

    def __init__(self, seed: int) -> None:
        self._tokens = torch.randint(
            VOCABULARY, (len(COUNTED), LENGTH + 1), generator=torch.Generator().manual_seed(seed)
        )

    def __len__(self) -> int:
        return len(COUNTED)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        tokens, mask = self._tokens[number], torch.zeros(LENGTH)
        mask[list(COUNTED[number])] = 1
        return {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": mask, "position_ids": torch.arange(LENGTH)}


def gradients(cfg: PretrainConfig, seed: int, device: torch.device) -> dict[str, list[float]]:
    """Gradients by parameter, reduced over ranks."""
    hybrid, megatron = hybrid_layout(cfg), transformer_config(cfg)
    chunks: Any = build_model(cfg, megatron, hybrid, choose_backend("local"), device)
    chunks, size = wrap_data_parallel(cfg, megatron, chunks), len(COUNTED)
    losses = AuxiliaryLosses(cfg, hybrid, chunks)
    batches = EarlyBatches(micro_batches(cfg, Sequences(seed), 0, size, device))
    losses.begin_step(1, is_logged=False, batch=size, batches=batches)
    run_step(cfg, chunks, [batches], forward_only=False, batch_size=size)
    return {name: weight.main_grad.flatten().tolist() for name, weight in chunks[0].named_parameters()}


def main() -> None:
    seed, division, micro_batch_size = json.loads(sys.argv[1])
    parallel = ParallelConfig(distributed_optimizer=False, **division)
    cfg = config(parallel, micro_batch_size)
    device = initialize(parallel, cfg.seed)
    found = gradients(cfg, seed, device)
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found))
    shutdown()


if __name__ == "__main__":
    main()
