"""Scores key blocks by a small trained index branch.

MSA, QSA and SeerAttention (arXiv 2410.13276) have such a branch. Queries and keys are projected to a few dimensions. A
block's feature is the log-sum-exp of its projected keys in each dimension, a smooth maximum. Each query head has an
index head; a block's score is their log-sum-exp.
"""

import math

import torch
from torch import Tensor

from s2train.attention.selection.scorer import WeightOf, grouped, precise
from s2train.attention.weights import AttentionShape, Weight


class IndexScorer:
    """An index branch of `dim` dimensions a head."""

    losses: tuple[str, ...] = ("kl",)
    earlier_rows = 0
    normalizes = False

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def weights(self, shape: AttentionShape) -> tuple[Weight, ...]:
        std = shape.head_dim**-0.5
        size = (shape.head_dim, self.dim)
        return (
            Weight("index_query", (shape.num_heads, *size), split=0, std=std, may_be_missing=True),
            Weight("index_key", (shape.num_query_groups, *size), split=0, std=std, may_be_missing=True),
        )

    def feature_size(self, head_dim: int) -> int:
        return self.dim

    def pool_keys(self, keys: Tensor, weight: WeightOf) -> Tensor:
        projected = torch.einsum("bnthd,hdi->bnthi", keys, weight("index_key").to(keys.dtype))
        return projected.to(precise(keys.dtype)).logsumexp(2) - math.log(keys.shape[2])

    def head_scores(self, queries: Tensor, features: Tensor, candidates: Tensor, weight: WeightOf) -> Tensor:
        projected = torch.einsum("brhd,hdi->brhi", queries, weight("index_query").to(queries.dtype))
        scaled = grouped(projected * self.dim**-0.5, features.shape[2])
        return torch.einsum("bhgri,bnhi->bhgrn", scaled, features)

    def flops(self, rows: int, blocks: int, tokens: int, shape: AttentionShape) -> int:
        project = shape.num_query_groups * tokens + shape.num_heads * rows
        return 2 * self.dim * (shape.head_dim * project + shape.num_heads * rows * blocks)

    def activation_bytes(self, rows: int, blocks: int, tokens: int, shape: AttentionShape, element_size: int) -> int:
        of_keys = shape.num_query_groups * tokens * self.dim * (element_size + 4)
        return of_keys + 4 * shape.num_heads * rows * blocks
