"""Scores key blocks by kernel features and a small CNN.

This is SEA (arXiv 2310.01777), block-wise and causal. Positive features phi(x) = exp(W x - |x|^2 / 2) give each query
block a share of each candidate key block. The features cost linear time in the sequence's length; the map of shares, a
compressed map of attention, has an entry for each pair of blocks. A CNN over the map, of two layers, refines it. Each
layer looks at two rows before a row and at two columns on each side. Rows see their own candidates alone, so nothing
later enters. The features' stabilisers are maxima of one row or one block: a maximum over all keys would leak the
future.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from s2train.attention.selection.convolution import convolve
from s2train.attention.selection.scorer import WeightOf, grouped, log_products, precise
from s2train.attention.weights import AttentionShape, Weight
from s2train.kernels.candidates import MASKED, combine_heads

_ROWS, _COLUMNS = 3, 5  # a convolution's extent
_PADDING = (_COLUMNS // 2, _COLUMNS // 2, _ROWS - 1, 0)


class SeaScorer:
    """Scores key blocks by SEA.

    Args:
        features: kernel features of each head.
        channels: of the CNN, for each KV head.
    """

    losses: tuple[str, ...] = ("kl", "mse")
    earlier_rows = 2 * (_ROWS - 1)
    normalizes = False

    def __init__(self, features: int, channels: int) -> None:
        self.features, self.channels = features, channels

    def weights(self, shape: AttentionShape) -> tuple[Weight, ...]:
        kv, group = shape.num_query_groups, shape.num_heads // shape.num_query_groups
        inputs = 2 * group
        first = (kv * self.channels, inputs, _ROWS, _COLUMNS)
        std = (inputs * _ROWS * _COLUMNS) ** -0.5
        return (
            Weight("kernel_features", (kv, shape.head_dim, self.features), split=0, std=1.0, may_be_missing=True),
            Weight("sharpness", (kv, 1, 1), split=0, fill=1.0, may_be_missing=True, is_gain=True),
            # no biases: columns and rows outside of the map then stay zero, however large the map is
            Weight("cnn_first", first, split=0, std=std, may_be_missing=True),
            Weight("cnn_second", (kv, self.channels, _ROWS, _COLUMNS), split=0, fill=0.0, may_be_missing=True),
        )

    def feature_size(self, head_dim: int) -> int:
        return self.features

    def pool_keys(self, keys: Tensor, weight: WeightOf) -> Tensor:
        of = weight("kernel_features").to(keys.dtype)
        scale = keys.shape[-1] ** -0.25
        projected = torch.einsum("bnthd,hdm->bnthm", keys, of).to(precise(keys.dtype)) * scale
        norms = keys.to(projected.dtype).square().sum(-1, keepdim=True) * (scale**2 / 2)
        return (projected - norms).logsumexp(2)

    def head_scores(self, queries: Tensor, features: Tensor, candidates: Tensor, weight: WeightOf) -> Tensor:
        num_kv_heads = features.shape[2]
        projected = torch.einsum(
            "bhgrd,hdm->bhgrm", grouped(queries, num_kv_heads), weight("kernel_features").to(queries.dtype)
        )
        found = log_products(projected * queries.shape[-1] ** -0.25, features)  # a row's |q|^2 / 2 cancels
        is_candidate = candidates[:, :, None]
        shares = found.masked_fill(~is_candidate, MASKED).log_softmax(-1)
        maps = torch.cat([shares.masked_fill(~is_candidate, 0), shares.exp() * is_candidate], dim=2).flatten(1, 2)
        first, second = (weight(name).to(maps.dtype) for name in ("cnn_first", "cnn_second"))
        hidden = F.gelu(convolve(F.pad(maps, _PADDING), first, num_kv_heads))
        refined = convolve(F.pad(hidden, _PADDING), second, num_kv_heads)
        summed = combine_heads(shares, candidates, normalize=False)
        return (weight("sharpness").to(maps.dtype) * summed + refined)[:, :, None]

    def flops(self, rows: int, blocks: int, tokens: int, shape: AttentionShape) -> int:
        project = shape.num_query_groups * tokens + shape.num_heads * rows
        features = self.features * (shape.head_dim * project + shape.num_heads * rows * blocks)
        inputs = 2 * shape.num_heads // shape.num_query_groups
        cnn = shape.num_query_groups * self.channels * (inputs + 1) * _ROWS * _COLUMNS * rows * blocks
        return 2 * (features + cnn)

    def activation_bytes(self, rows: int, blocks: int, tokens: int, shape: AttentionShape, element_size: int) -> int:
        of_keys = shape.num_query_groups * tokens * self.features * (element_size + 4)
        maps = 6 * shape.num_heads + 3 * shape.num_query_groups * self.channels
        return of_keys + 4 * maps * rows * blocks
