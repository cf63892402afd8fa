"""Text generation."""

from typing import Protocol

import torch
from torch import Tensor

from s2train.megatron.cached_model import CachedModel
from s2train.megatron.kv_cache import kv_cache
from s2train.megatron.model import unwrap

_TOKENS_BETWEEN_CHECKS = 8  # asking the device whether all sequences have ended stalls it


class LanguageModel(Protocol):
    """What is asked of a model: Megatron's GPTModel satisfies it, and so does any causal callable."""

    def __call__(self, tokens: Tensor, position_ids: Tensor, attention_mask: None, /) -> Tensor:
        """int64 [b, s], int64 [b, s], None -> logits [b, s, vocab] over the whole vocabulary."""


class Decode(Protocol):
    """Continues prompts: prompts int64 [b, s] and a count n -> the next n tokens, int64 [b, n]."""

    def __call__(self, prompts: Tensor, new_tokens: int, /) -> Tensor: ...


@torch.no_grad()
def greedy_decode(model: LanguageModel, prompts: Tensor, new_tokens: int) -> Tensor:
    """The most likely next token, `new_tokens` times, by a full forward pass each (no cache).

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


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    prompts: Tensor,
    new_tokens: int,
    *,
    lengths: Tensor | None = None,
    eod: int | None = None,
    prefill_chunk: int = 8192,
    cuda_graph: bool = False,
) -> Tensor:
    """The most likely next token, `new_tokens` times, over a cache of the keys and values that the layout keeps.

    Every rank of a tensor parallel group calls it alike and gets the same tokens.

    Args:
        model: a GPTModel, bare or in Megatron's wrappers, in eval mode, whole on each tensor parallel group.
        prompts: int64 [b, s], 1 token or more; shorter prompts are padded at the right.
        lengths: int [b] of the prompts; None: all s.
        eod: the token that ends a sequence; what follows it is filled with it, and its pages are freed. None: no end.
        prefill_chunk: prompt tokens of a sequence that go through the model at once.
        cuda_graph: see `CachedModel`; worth it for more than about ten tokens.

    Returns:
        int64 [b, new_tokens].

    Raises:
        ValueError: a model that can't decode (see `kv_cache`), or prompts and lengths that don't fit together.
    """
    batch, size = prompts.shape
    out = prompts.new_full((batch, new_tokens), 0 if eod is None else eod)
    if new_tokens == 0:
        return out
    gpt = unwrap(model)
    with kv_cache(gpt, batch, size + new_tokens) as cache:
        cached = CachedModel(gpt, cache, cuda_graph)
        token = cached.prefill(prompts, lengths, prefill_chunk).argmax(-1)
        ended = torch.zeros_like(token, dtype=torch.bool)
        for index in range(new_tokens):
            if eod is not None:
                token = torch.where(ended, eod, token)
                ended |= token == eod
            out[:, index] = token
            if index + 1 == new_tokens:
                break
            if eod is not None and index % _TOKENS_BETWEEN_CHECKS == 0:
                for sequence in ended.nonzero().flatten().tolist():
                    if not cache.finished[sequence]:
                        cache.finish(sequence)
                if cache.finished.all():
                    break
            token = cached.decode(token).argmax(-1)
    return out
