"""Text generation.

With s2train.megatron's setup and checkpoint:

    device = initialize(ParallelConfig(), seed=1)
    loaded = load_for_inference("runs/7b_hybrid", device)
    tokens = generate(loaded.model, prompts, 100, lengths=lengths, eod=0)
"""

from typing import Protocol

import torch
from torch import Tensor

from s2train.inference.cached_model import CachedModel
from s2train.inference.kv_cache import kv_cache
from s2train.megatron.model import unwrap

_TOKENS_BETWEEN_CHECKS = 8  # asking the device whether all sequences have ended stalls it


class Decode(Protocol):
    """Continues prompts: prompts int64 [b, s] and a count n -> the next n tokens, int64 [b, n]."""

    def __call__(self, prompts: Tensor, new_tokens: int, /) -> Tensor: ...


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
        ValueError: a model that can't decode (see `kv_cache`), prompts that are no tokens of its vocabulary, fewer than
            0 new tokens, or lengths that don't fit the prompts.
    """
    gpt = unwrap(model)
    if prompts.dim() != 2 or prompts.dtype != torch.int64 or prompts.numel() == 0 or new_tokens < 0:
        raise ValueError(
            f"prompts must be int64 [b, s] with a token or more and new_tokens 0 or more, got {prompts.dtype}"
            f" {list(prompts.shape)} and {new_tokens}"
        )
    least, most = int(prompts.min()), int(prompts.max())
    if not 0 <= least <= most < gpt.vocab_size:
        raise ValueError(f"prompts hold {least} to {most}: the model's tokens are 0 to {gpt.vocab_size - 1}")
    batch, size = prompts.shape
    out = prompts.new_full((batch, new_tokens), 0 if eod is None else eod)
    if new_tokens == 0:
        return out
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
