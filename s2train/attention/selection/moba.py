"""Scores a key block by the mean of its keys (MoBA).

The scorer has no weights. Published MoBA (arXiv 2502.13189) scores for each token. Here a query block's list comes from
one pooled query, which must not hold tokens of the block itself.
"""

import torch
from torch import Tensor

from s2train.attention.selection.scorer import WeightOf, grouped, precise
from s2train.attention.weights import AttentionShape, Weight


class MobaScorer:
    """The mean over a group's heads of the softmax over candidate blocks."""

    losses: tuple[str, ...] = ()
    earlier_rows = 0
    normalizes = True

    def weights(self, shape: AttentionShape) -> tuple[Weight, ...]:
        return ()

    def feature_size(self, head_dim: int) -> int:
        return head_dim

    def pool_keys(self, keys: Tensor, weight: WeightOf) -> Tensor:
        return keys.mean(2, dtype=precise(keys.dtype))

    def head_scores(self, queries: Tensor, features: Tensor, candidates: Tensor, weight: WeightOf) -> Tensor:
        scaled = grouped(queries * queries.shape[-1] ** -0.5, features.shape[2])
        return torch.einsum("bhgrd,bnhd->bhgrn", scaled, features)

    def flops(self, rows: int, blocks: int, tokens: int, shape: AttentionShape) -> int:
        return 2 * shape.num_heads * shape.head_dim * rows * blocks

    def activation_bytes(self, rows: int, blocks: int, tokens: int, shape: AttentionShape, element_size: int) -> int:
        return 0
