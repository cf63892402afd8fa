"""Loads a checkpoint's model for inference."""

from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.transformer.module import MegatronModule

from s2train.attention.hybrid import HybridLayout
from s2train.checkpoints.folders import find_checkpoint, read_config, read_progress
from s2train.checkpoints.masks import check_masks, mask_digests
from s2train.checkpoints.shards import load_shards, sharding_metadata
from s2train.config import PretrainConfig
from s2train.megatron.core_attention import cores_of
from s2train.megatron.layer_backends import backend_of
from s2train.megatron.model import build_model, transformer_config, unwrap
from s2train.planning import hybrid_layout


@dataclass
class Loaded:
    """A trained model in eval mode, with its configuration."""

    config: PretrainConfig
    model: MegatronModule
    step: int
    path: Path


def load_for_inference(
    checkpoint: str | Path,
    device: torch.device,
    tp: int = 1,
    attention_backend: str = "auto",
    layer_backend: str | None = None,
    *,
    hybrid: HybridLayout | None = None,
    seq_length: int | None = None,
    precision: str | None = None,
    recompute: str = "none",
) -> Loaded:
    """Load the model of a checkpoint in eval mode, without its optimizer.

    Each tensor parallel group holds the whole model. Call after `s2train.megatron.setup.initialize` with this tp. The
    model takes (tokens [b, s] int64, position_ids [b, s] int64, None) and returns logits [b, s, vocab].

    Args:
        layer_backend: of the layers around attention; None takes the run's, transformer-engine only if it works.
        hybrid: attention of other kinds without weights, over the same heads; None: the run's.
        seq_length, precision: None: the run's.
        recompute: as in a run, for backward passes in train mode.
    Raises:
        ConfigError: there is no checkpoint, it is damaged, or it was trained with other masks than its files hold now.
    """
    path = find_checkpoint(checkpoint)
    cfg, progress = read_config(path), read_progress(path)
    if hybrid is None:
        hybrid = hybrid_layout(cfg)
        check_masks(progress.masks, mask_digests(hybrid), path, "checkpoint")
    cfg.attention_backend = attention_backend
    cfg.parallel.tp, cfg.parallel.pp, cfg.parallel.vpp, cfg.parallel.cp = tp, 1, None, 1
    cfg.parallel.sequence_parallel = False
    cfg.train.recompute, cfg.train.recompute_num_layers = recompute, 1
    cfg.train.seq_length, cfg.train.precision = seq_length or cfg.train.seq_length, precision or cfg.train.precision
    # Any backend loads another's weights, and computes in the run's precision.
    cfg.layer_backend, cfg.fp8 = layer_backend or ("local" if cfg.layer_backend == "local" else "auto"), "none"
    # The run's kernels may not be installed here, or not support a query offset. No loss is computed.
    cfg.dense_attention, cfg.elementwise, cfg.loss = "auto", "auto", "torch"
    (chunk,) = build_model(cfg, transformer_config(cfg), hybrid, backend_of(cfg), device)
    gpt = unwrap(chunk)
    gpt.parallel_output = False  # gathers the logits over tensor parallel ranks
    gpt.output_layer.gather_output = True
    gpt.load_state_dict(load_shards({"model": gpt.sharded_state_dict(metadata=sharding_metadata())}, path)["model"])
    chunk.eval()
    for core in cores_of(gpt):
        core.step = progress.step  # that its random numbers depend on
    return Loaded(config=cfg, model=chunk, step=progress.step, path=path)
