"""Needle evaluation of a checkpoint, from its settings to its results."""

import os
from functools import partial
from pathlib import Path

from megatron.core import parallel_state

from s2train.config import NeedleConfig, ParallelConfig
from s2train.data.needles import NOISE, NeedleSampler, text_haystack
from s2train.data.tokenizers import load_tokenizer
from s2train.errors import ConfigError
from s2train.evaluation.generate import greedy_decode
from s2train.evaluation.needle import Ranks, choose_grid
from s2train.evaluation.results import NeedleResults, output_folder, weights_fingerprint
from s2train.evaluation.run import run_needles
from s2train.megatron.setup import initialize, shutdown
from s2train.training.checkpoint import find_checkpoint, load_for_inference


def evaluate(cfg: NeedleConfig) -> None:
    """Load the checkpoint and evaluate it, on all ranks together.

    Raises:
        ConfigError: a setting that can't work.
    """
    find_checkpoint(cfg.checkpoint)
    files = cfg.haystack if isinstance(cfg.haystack, list) else [cfg.haystack]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if cfg.tp < 1 or world % cfg.tp:
        remedy = f"Use a divisor of {world}, or start more processes with torchrun --nproc-per-node"
        raise ConfigError("tp", cfg.tp, f"does not divide the {world} processes of this job", remedy)
    device = initialize(ParallelConfig(tp=cfg.tp), cfg.seed)
    loaded = load_for_inference(cfg.checkpoint, device, cfg.tp, cfg.attention_backend)
    trained_length, tokenizer = loaded.config.train.seq_length, load_tokenizer(loaded.config.data.tokenizer)
    haystack = NOISE if cfg.haystack == "noise" else text_haystack([Path(file) for file in files])
    sampler = NeedleSampler(tokenizer, haystack)
    grid = choose_grid(cfg, trained_length, sampler)
    settings = {
        "weights": weights_fingerprint(loaded.model),
        "tokenizer": tokenizer.fingerprint,
        "haystack": cfg.haystack,
        "trials": cfg.trials,
        "seed": cfg.seed,
        "attention_backend": cfg.attention_backend,
    }
    run_needles(
        partial(greedy_decode, loaded.model),
        sampler,
        grid,
        NeedleResults(str(loaded.path), loaded.step, settings, list(grid.lengths), list(grid.depths)),
        output_folder(cfg),
        batch_size=cfg.batch_size,
        device=device,
        trained_length=trained_length,
        ranks=Ranks(
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            parallel_state.get_data_parallel_group(),
        ),
        title=f"Needle retrieval: {loaded.config.model.name}",
    )
    shutdown()
