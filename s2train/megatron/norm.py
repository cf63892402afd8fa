"""torch's RMSNorm, made to work with sequence parallel."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm for Megatron's norm protocol (`config`, `hidden_size`, `eps`).

    Input and output are [s, b, h]. Megatron's own wrapper rejects sequence parallel. It only needs a mark
    on the weight, by which `finalize_model_grads` sums its gradient over the tensor parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
