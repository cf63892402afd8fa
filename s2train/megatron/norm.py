"""torch's RMSNorm, made to work with sequence parallel."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm for Megatron's norm protocol (`config`, `hidden_size`, `eps`).

    Input and output are [s, b, h]. Megatron's own wrapper rejects sequence parallel. It only needs a mark
    on the weight, by which `finalize_model_grads` sums its gradient over the tensor parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class HeadNorm(RMSNorm):
    """RMSNorm of each head's queries or keys [s, b, h, d].

    Those saved for the backward are contiguous. Views would keep the projection's output in memory, which has the heads
    of all ranks where ranks share KV heads.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous())
