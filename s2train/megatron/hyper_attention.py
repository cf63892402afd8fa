"""Core attention of the kind `hyper`."""

import torch
from torch import Tensor

from s2train.attention.hyper import HyperKind
from s2train.attention.kind import LayerLayout
from s2train.kernels.attention import Backend
from s2train.kernels.dense import dense_causal_attention
from s2train.kernels.hyper import hyper_attention
from s2train.megatron.core_attention import CausalCoreAttention


class HyperCoreAttention(CausalCoreAttention):
    """HyperAttention in training, exact attention over all cached keys in decoding.

    One exact query reads as many keys as hashing them again would.
    """

    captures_decoding = True

    @classmethod
    def compile_kernels(
        cls, layer: LayerLayout, query: Tensor, key: Tensor, value: Tensor, query_offset: int, backend: Backend
    ) -> None:
        """Run the op once, forward and backward."""
        assert isinstance(layer.kind, HyperKind)
        seeds = torch.zeros(key.shape[2], dtype=torch.int64, device=query.device)
        out = hyper_attention(query, key, value, layer.kind.op_settings, seeds, seeds, backend=backend)
        out.backward(torch.ones_like(out))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, query_offset: int) -> Tensor:
        if self.kv is not None:
            return dense_causal_attention(
                query, key, value, softmax_scale=self.softmax_scale, query_offset=query_offset
            )
        assert query_offset == 0, "only a cache brings earlier keys"
        kind = self.layer_layout.kind
        assert isinstance(kind, HyperKind)
        return hyper_attention(
            query,
            key,
            value,
            kind.op_settings,
            self._seeds("projections", query.device, each_step=not kind.settings.fixed_projections),
            self._seeds("samples", query.device),
            softmax_scale=self.softmax_scale,
            backend=self.backend,
        )

    def attend_cached(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert self.kv is not None
        return self.kv.attend(self, query, key, value)

    def cached_layout(self, max_length: int, device: torch.device) -> None:
        return None

    def _seeds(self, purpose: str, device: torch.device, *, each_step: bool = True) -> Tensor:
        """Return each KV head's seed: that of its first query head.

        Ranks that share a KV head get the same one.
        """
        first, last = self.heads
        group = self.shape.num_heads // self.shape.num_query_groups
        heads = range(first // group * group, last, group)
        seeds = [self.random_seed(head - first, purpose, each_step=each_step) for head in heads]
        values = torch.tensor(seeds, dtype=torch.int64)
        # From pageable memory the host would wait for the device, in every layer.
        return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)
