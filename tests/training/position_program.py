"""Writes the held-out losses of a checkpoint at each position, from its logits: [samples, s] fp32."""

import sys
import warnings

import torch

from s2train.checkpoints.inference_model import load_for_inference
from s2train.config import ParallelConfig
from s2train.data.checks import num_train_samples
from s2train.data.datasets import build_datasets
from s2train.data.tokenizers import load_tokenizer
from s2train.megatron.setup import initialize, shutdown


@torch.no_grad()
def main(checkpoint: str, output: str) -> None:
    device = initialize(ParallelConfig(), 1)
    loaded = load_for_inference(checkpoint, device)
    cfg = loaded.config
    count = cfg.evaluation.batches * cfg.train.global_batch_size
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    _, held_out = build_datasets(cfg, tokenizer, num_train_samples(cfg), count)
    assert held_out is not None
    tokens, labels = (torch.stack([held_out[i][name] for i in range(count)]) for name in ("tokens", "labels"))
    assert all(bool((held_out[i]["loss_mask"] == 1).all()) for i in range(count))
    positions = torch.arange(tokens.shape[1]).expand_as(tokens).contiguous()
    logits = loaded.model(tokens, positions, None).double()
    torch.save(torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none"), output)
    shutdown()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
