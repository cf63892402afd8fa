"""Layers of different pipeline stages are drawn apart."""

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.program import pretrain


@pytest.mark.slow
def test_no_two_layers_start_with_the_same_weights(tmp_path: Path) -> None:
    # So small a learning rate leaves the weights as they were drawn.
    settings = [
        "train.steps=1",
        "optim.lr=1e-30",
        "optim.min_lr=0",
        "optim.warmup_steps=0",
        "optim.weight_decay=0",
        "parallel.pp=2",
    ]
    done = pretrain(tmp_path, *settings, processes=2)
    assert done.status == 0, done.err
    dcp_to_torch_save(tmp_path / "checkpoints" / "iter_0000001", tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    layers = whole["decoder.layers.mlp.linear_fc1.weight"]
    assert layers.shape[0] == 4
    for first in range(4):
        for second in range(first + 1, 4):
            assert not torch.equal(layers[first], layers[second])
