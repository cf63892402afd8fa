"""Logits of a checkpoint by Megatron, in float32, written to a file.

Arguments: checkpoint, tokens (.npy, int64 [b, s]), output (.npy). In a separate process, since Megatron's groups and
its CPU mode are global.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from s2train.checkpoints.inference_model import load_for_inference
from s2train.config import ParallelConfig
from s2train.megatron.setup import initialize, shutdown


@torch.no_grad()
def main() -> None:
    checkpoint, tokens_file, output = map(Path, sys.argv[1:])
    device = initialize(ParallelConfig(), 1)
    tokens = torch.from_numpy(np.load(tokens_file)).to(device)
    positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens).contiguous()
    logits = load_for_inference(checkpoint, device).model(tokens, positions, None)
    np.save(output, logits.float().cpu().numpy())
    shutdown()


if __name__ == "__main__":
    main()
