"""Estimates what attention takes on a CPU beside other activations."""

from s2train.attention.kind import LayerLayout, PairBytes
from s2train.config import PretrainConfig
from s2train.costs.rank_share import element_bytes
from s2train.kernels.torch_backend import CACHED_BYTES


def kept_on_cpu(cfg: PretrainConfig, layer: LayerLayout) -> int:
    """Return bytes that a layer keeps for a micro batch's backward.

    Masks so small that layers share them are not counted.
    """
    each = layer.kind.cpu_bytes(layer, element_bytes(cfg))
    kept = each.kept * _pairs(cfg, each)
    return 0 if _is_shared(cfg, each) and kept <= CACHED_BYTES else kept


def temporary_on_cpu(cfg: PretrainConfig, layer: LayerLayout) -> int:
    """Return bytes that a layer takes besides, while it is computed."""
    each = layer.kind.cpu_bytes(layer, element_bytes(cfg))
    return each.temporary * _pairs(cfg, each)


def _pairs(cfg: PretrainConfig, each: PairBytes) -> int:
    """Pairs of a query and a key on a rank.

    They are of all heads; and of all sequences, unless these share what is kept.
    """
    parallel, train = cfg.parallel, cfg.train
    heads, queries = cfg.model.num_attention_heads // parallel.tp, train.seq_length // parallel.cp
    return heads * queries * train.seq_length * (1 if _is_shared(cfg, each) else train.micro_batch_size)


def _is_shared(cfg: PretrainConfig, each: PairBytes) -> bool:
    return each.is_shared and not cfg.data.attention_within_documents
