"""Runs launch/pretrain.py and saves the samples that it trained on to the file S2TRAIN_TEST_DRAWN.

The file holds int64 [samples, seq_length], in training order.
"""

import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def record(drawn: list[torch.Tensor]) -> None:
    """Append every micro batch that a step takes to `drawn`."""
    from s2train.training import loop

    micro_batches = loop.micro_batches

    def recorded(*args: Any, **kwargs: Any) -> Iterator[dict[str, torch.Tensor]]:
        for batch in micro_batches(*args, **kwargs):
            drawn.append(batch["tokens"])
            yield batch

    loop.micro_batches = recorded


if __name__ == "__main__":
    tokens: list[torch.Tensor] = []
    record(tokens)
    sys.argv[0] = str(ROOT / "launch" / "pretrain.py")
    sys.path.insert(0, str(ROOT / "launch"))
    runpy.run_path(sys.argv[0], run_name="__main__")
    torch.save(torch.cat(tokens), os.environ["S2TRAIN_TEST_DRAWN"])
