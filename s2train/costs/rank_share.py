"""One rank's share of a run: layers, tokens and micro batches."""

from s2train.attention.kind import LayerLayout
from s2train.config import PretrainConfig

Chunks = tuple[tuple[LayerLayout, ...], ...]  # the layers of each model chunk of a rank


def element_bytes(cfg: PretrainConfig) -> int:
    """Return bytes of a weight or an activation in the run's precision."""
    return 2 if cfg.train.precision == "bf16" else 4


def rank_tokens(cfg: PretrainConfig) -> int:
    """Return the tokens of a micro batch on a rank."""
    return cfg.train.seq_length // cfg.parallel.cp * cfg.train.micro_batch_size


def data_parallel(cfg: PretrainConfig, world_size: int) -> int:
    """Return the number of model copies that `world_size` ranks hold."""
    return world_size // (cfg.parallel.tp * cfg.parallel.pp * cfg.parallel.cp)


def micro_batches(cfg: PretrainConfig, world_size: int) -> int:
    """Return micro batches per step on each data-parallel rank."""
    return cfg.train.global_batch_size // (data_parallel(cfg, world_size) * cfg.train.micro_batch_size)
