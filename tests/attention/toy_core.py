"""Core attention of the toy kind, in plain torch."""

import torch
from torch import Tensor

from s2train.megatron.core_attention import CausalCoreAttention


class ToyCoreAttention(CausalCoreAttention):
    """Window, and chosen earlier keys."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, query_offset: int) -> Tensor:
        group = query.shape[2] // key.shape[2]
        keys, values = (x.repeat_interleave(group, dim=2) for x in (key, value))
        learned = self.weight("direction") * self.weight("scale")
        drawn = torch.stack([self._draw(head, key) for head in range(query.shape[2])])
        chosen = torch.einsum("sbhd,hd->bhs", keys, learned + drawn) > 0
        position = torch.arange(key.shape[0], device=key.device)
        rows = position[query_offset:, None]
        near = rows - position < self.layer_layout.kind.settings.window
        read = (near | chosen[:, :, None, :]) & (rows >= position)
        scores = torch.einsum("qbhd,kbhd->bhqk", query, keys).float() * self.softmax_scale
        weights = scores.masked_fill(~read, float("-inf")).softmax(-1).to(value.dtype)
        out = torch.einsum("bhqk,kbhd->qbhd", weights, values)
        if not torch.is_grad_enabled():
            return out
        predicted = torch.einsum("sbhd,hd->bhs", keys.detach(), learned).sigmoid()
        error = (predicted - values.detach().mean(-1).sigmoid().permute(1, 2, 0)).square()
        heads = self.shape.num_heads
        causal = (rows >= position).float().sum()
        self.record("kept_share", read.float().sum() / (causal * read.shape[0] * heads))
        return self.add_loss(out, "agreement", error.mean((0, 2)).sum() / heads)

    def attend_cached(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert self.kv is not None
        return self.kv.attend_each(query, key, value)

    def cached_layout(self, max_length: int, device: torch.device) -> None:
        return None  # any key may be chosen later

    def _draw(self, head: int, like: Tensor) -> Tensor:
        drawn = torch.empty(like.shape[-1], device=like.device)
        return drawn.normal_(generator=self.random_generator(head, like.device)).to(like.dtype)
