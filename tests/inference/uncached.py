"""Decodes by whole forward passes, as a reference for decoding over a cache."""

from typing import Protocol

import torch
from torch import Tensor


class LanguageModel(Protocol):
    """Interface of a model: Megatron's GPTModel, or any causal callable."""

    def __call__(self, tokens: Tensor, position_ids: Tensor, attention_mask: None, /) -> Tensor:
        """int64 [b, s], int64 [b, s], None -> logits [b, s, vocab] over the whole vocabulary."""


@torch.no_grad()
def greedy_decode(model: LanguageModel, prompts: Tensor, new_tokens: int) -> Tensor:
    """Decode greedily, with a full forward pass for each token and no cache.

    Every pass has the final length, with zeros where nothing is written yet: a causal model does not see
    them, and layouts and compiled kernels are made once instead of once a token.

    Args:
        prompts: int64 [b, s], all of one length.

    Returns:
        int64 [b, new_tokens].

    Raises:
        ValueError: the model is in training mode.
    """
    if getattr(model, "training", False):
        raise ValueError("the model is in training mode: call model.eval() before decoding")
    batch, prompt_length = prompts.shape
    tokens = prompts.new_zeros(batch, prompt_length + new_tokens)
    tokens[:, :prompt_length] = prompts
    position_ids = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens).contiguous()
    for index in range(prompt_length, prompt_length + new_tokens):
        logits = model(tokens, position_ids, None)
        tokens[:, index] = logits[:, index - 1].argmax(dim=-1)
    return tokens[:, prompt_length:]
