"""Rotary embedding of queries and keys by Triton kernels: Liger-Kernel's, or ours.

It replaces Megatron's within self attention.
"""

from typing import Any

import torch
from liger_kernel.ops import LigerRopeFunction
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from torch import Tensor

from s2train.kernels.split_heads import split_heads
from s2train.megatron.shared_kv_heads import KVSharingSelfAttention


class Rotation:
    """Rotates queries and keys; caches cosines and sines for all layers.

    The cache holds those of the last angles. All arithmetic is fp32 (fp64 for fp64 inputs), rounded once at the end;
    Megatron's own rounds cosines and sines first.
    """

    def __init__(self) -> None:
        self._angles: Tensor | None = None
        self._tables: dict[tuple[int, torch.dtype, float], tuple[Tensor, Tensor]] = {}

    def __call__(self, query: Tensor, key: Tensor, angles: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """Rotate query [s, b, h, d] and key [s, b, h_kv, d].

        Args:
            query, key: overwritten if contiguous; so are their gradients in the backward.
            angles: fp32 [s, 1 or b, 1, r] from Megatron's rotary embedding, whose second half equals the first; the
                first r dimensions of a head are rotated.
            factor: of cosines and sines, which is YaRN's temperature.
        """
        cos, sin = self._cos_sin(angles, query.shape[1], query.dtype, factor)
        rows = query.shape[0] * query.shape[1]  # tokens, which Liger-Kernel takes as one sequence
        flat = (x.reshape(1, rows, *x.shape[2:]).transpose(1, 2) for x in (query, key))
        turned = LigerRopeFunction.apply(*flat, cos, sin, None, 1, angles.shape[-1])
        query, key = (x.transpose(1, 2).view(y.shape) for x, y in zip(turned, (query, key), strict=True))
        return query, key

    def split(self, packed: Tensor, dim: int, angles: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Split a projection into rotated queries and keys, and values.

        Args:
            packed: [s, b, h_kv, (h / h_kv + 2) · dim].
            angles, factor: as of a call.
        """
        cos, sin = self._cos_sin(angles, packed.shape[1], packed.dtype, factor)
        return split_heads(packed, dim, cos[0], sin[0])

    def _cos_sin(self, angles: Tensor, batch: int, dtype: torch.dtype, factor: float) -> tuple[Tensor, Tensor]:
        """Each [1, s · b, r / 2]."""
        if self._angles is not angles:
            self._angles, self._tables = angles, {}
        wanted = (batch, torch.promote_types(dtype, torch.float32), factor)
        if wanted not in self._tables:
            half = angles[..., : angles.shape[-1] // 2].expand(-1, batch, -1, -1).to(wanted[1])
            rows = half.reshape(1, -1, half.shape[-1])
            self._tables[wanted] = (rows.cos() * factor, rows.sin() * factor)
        return self._tables[wanted]


class RotatingSelfAttention(KVSharingSelfAttention):
    """Megatron's self attention with `rotation` right after the projection.

    Parameters, names and results are unchanged. Packed documents and context parallel are in the angles, as for
    Megatron's own.

    Args:
        splits: rotate while splitting the projection, which needs whole KV heads on each rank.
    """

    def __init__(self, *args: Any, rotation: Rotation, splits: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rotation, self.splits = rotation, splits
        self.angles: Tensor | None = None  # of the current call
        self.factor = _yarn_get_concentration_factor_from_config(self.config)

    def forward(self, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any) -> Any:
        self.angles = rotary_pos_emb
        try:
            return super().forward(*args, rotary_pos_emb=None, **kwargs)
        finally:
            self.angles = None

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        if self.splits and self.angles is not None:
            packed, _ = super().get_query_key_value_tensors(*args, **{**kwargs, "split_qkv": False})
            return self.rotation.split(packed, self.hidden_size_per_attention_head, self.angles, self.factor)
        query, key, *others = super().get_query_key_value_tensors(*args, **kwargs)
        if self.angles is not None:
            query, key = self.rotation(query, key, self.angles, self.factor)
        return (query, key, *others)
