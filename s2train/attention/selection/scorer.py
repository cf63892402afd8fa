"""The protocol of scorers, which score key blocks for query blocks."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from s2train.attention.weights import AttentionShape, Weight
from s2train.kernels.candidates import combine_heads

WeightOf = Callable[[str], Tensor]  # a weight of this rank's heads, by name


class Scorer(Protocol):
    """Scores complete earlier key blocks per query block and KV head.

    All sizes are those of this rank's heads. Scores of a row depend on its own queries, on those of `earlier_rows` rows
    before it, and on keys of the rows' candidates only: nothing later enters. Features after the row's own block may be
    left out.

    Attributes:
        losses: auxiliary losses that its weights learn from; empty: it has no weights.
        earlier_rows: rows before a row that its scores depend on.
        normalizes: whether a head's scores become log-probabilities over the candidates before a group's are added.
    """

    losses: tuple[str, ...]
    earlier_rows: int
    normalizes: bool

    def weights(self, shape: AttentionShape) -> tuple[Weight, ...]:
        """Return the weights of a layer.

        Every weight is split over KV heads or query heads by its first dimension.
        """
        ...

    def feature_size(self, head_dim: int) -> int:
        """Numbers of a block's feature."""
        ...

    def pool_keys(self, keys: Tensor, weight: WeightOf) -> Tensor:
        """Pool the keys of complete blocks to features.

        Keys are [b, n, B, h_kv, d], features [b, n, h_kv, f] in `precise` dtype.
        """
        ...

    def head_scores(self, queries: Tensor, features: Tensor, candidates: Tensor, weight: WeightOf) -> Tensor:
        """Score key blocks by each head of a group.

        The result is [b, h_kv, group, rows, n_k]. A block's score is the heads' log-sum-exp; a scorer that combines
        heads itself gives a group of one. Values of blocks that are no candidates have no meaning.

        Args:
            queries: [b, rows, h, d], one for each query block.
            features: [b, n_k, h_kv, f] from `pool_keys`.
            candidates: bool [1 or b, 1, rows, n_k].
        """
        ...

    def flops(self, rows: int, blocks: int, tokens: int, shape: AttentionShape) -> int:
        """Count FLOPs of a forward pass.

        It computes `rows` x `blocks` scores, and pools `tokens` keys.
        """
        ...

    def activation_bytes(self, rows: int, blocks: int, tokens: int, shape: AttentionShape, element_size: int) -> int:
        """Count bytes that the scorer's backward pass needs, over all heads."""
        ...


def precise(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of pooled values and scores.

    It is float64 for float64, otherwise float32.
    """
    return torch.promote_types(dtype, torch.float32)


def grouped(queries: Tensor, num_kv_heads: int) -> Tensor:
    """Group queries by KV head.

    The result is a view [b, h_kv, group, rows, d] of queries [b, rows, h, d].
    """
    return queries.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)


def block_scores(scorer: Scorer, queries: Tensor, features: Tensor, candidates: Tensor, weight: WeightOf) -> Tensor:
    """Score key blocks for query blocks: [b, h_kv, rows, n_k].

    Arguments are those of `Scorer.head_scores`. Values of blocks that are no candidates have no meaning.
    """
    return combine_heads(scorer.head_scores(queries, features, candidates, weight), candidates, scorer.normalizes)


def log_products(queries: Tensor, features: Tensor) -> Tensor:
    """Compute the log-sum-exp over m of queries plus features.

    Queries [b, h, g, r, m] and features [b, n, h, m] give [b, h, g, r, n], as a matrix product of exponentials. Maxima
    of a row and of a block keep them in range; both cancel.
    """
    most_q, most_k = queries.amax(-1, keepdim=True).detach(), features.amax(-1, keepdim=True).detach()
    exp_q, exp_k = (queries - most_q).exp(), (features - most_k).exp()
    product = torch.einsum("bhgrm,bnhm->bhgrn", exp_q, exp_k).clamp_min(1e-30)
    return product.log() + most_q + most_k.squeeze(-1).transpose(1, 2)[:, :, None, None]
