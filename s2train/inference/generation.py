"""Generates text over a KV cache: greedily, or by sampling.

Example:

    device = initialize(ParallelConfig(), seed=1)
    loaded = load_for_inference("runs/7b_hybrid", device)
    tokens = generate(loaded.model, prompts, 100, lengths=lengths, eod=0)
"""

from collections.abc import Generator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from s2train.inference.cached_model import CachedModel
from s2train.inference.kv_cache import kv_cache
from s2train.inference.sampling import Choose, greedy
from s2train.megatron.model import unwrap

_TOKENS_BETWEEN_CHECKS = 8  # checking whether all sequences have ended synchronizes the device


class Decode(Protocol):
    """Continues prompts, int64 [b, s], by n tokens, int64 [b, n]."""

    def __call__(self, prompts: Tensor, new_tokens: int, /) -> Tensor: ...


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    prompts: Tensor,
    new_tokens: int,
    *,
    lengths: Tensor | None = None,
    eod: int | None = None,
    choose: Choose = greedy,
    prefill_chunk: int = 8192,
    cuda_graph: bool = False,
) -> Tensor:
    """Decode over a cache of what the layout keeps.

    Collective: every rank of a tensor parallel group calls it and gets the same tokens.

    Args:
        model: a GPTModel, with or without Megatron's wrappers, in eval mode; on each tensor parallel group in full.
        prompts: int64 [b, s], 1 token or more; shorter prompts are padded on the right.
        new_tokens: number of tokens to generate.
        lengths: int [b], lengths of the prompts; None: all s.
        eod: token that ends a sequence; the rest is filled with it, and the sequence's pages are freed. None: no end.
        choose: chooses the next tokens.
        prefill_chunk: prompt tokens of a sequence that go through the model at once.
        cuda_graph: see `CachedModel`; pays off for more than about ten tokens.

    Returns:
        int64 [b, new_tokens].

    Raises:
        ValueError: the model can't decode (see `kv_cache`), a prompt holds ids outside its vocabulary, new_tokens is
            negative, or lengths don't fit the prompts.
    """
    steps = stream(
        model,
        prompts,
        new_tokens,
        lengths=lengths,
        eod=eod,
        choose=choose,
        prefill_chunk=prefill_chunk,
        cuda_graph=cuda_graph,
    )
    tokens = list(steps)
    out = prompts.new_full((len(prompts), new_tokens), 0 if eod is None else eod)
    for index, token in enumerate(tokens):
        out[:, index] = token
    return out


@torch.no_grad()
def stream(
    model: torch.nn.Module,
    prompts: Tensor,
    new_tokens: int,
    *,
    lengths: Tensor | None = None,
    eod: int | None = None,
    choose: Choose = greedy,
    prefill_chunk: int = 8192,
    cuda_graph: bool = False,
) -> Generator[Tensor, None, None]:
    """Decode as `generate` does, and yield tokens as they are chosen.

    Each item holds one token of every sequence.

    Yields:
        int64 [b], up to new_tokens times; fewer if all sequences end.
    """
    _check(model, prompts, new_tokens)
    if new_tokens == 0:
        return
    batch, size = prompts.shape
    with kv_cache(unwrap(model), batch, size + new_tokens) as cache:
        cached = CachedModel(unwrap(model), cache, cuda_graph)
        token = choose(cached.prefill(prompts, lengths, prefill_chunk))
        ended = torch.zeros_like(token, dtype=torch.bool)
        for index in range(new_tokens):
            if eod is not None:
                token = torch.where(ended, eod, token)
                ended |= token == eod
            yield token
            if index + 1 == new_tokens:
                break
            if eod is not None and index % _TOKENS_BETWEEN_CHECKS == 0:
                for sequence in ended.nonzero().flatten().tolist():
                    if not cache.finished[sequence]:
                        cache.finish(sequence)
                if cache.finished.all():
                    break
            token = choose(cached.decode(token))


def pad_prompts(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Stack prompts, padded on the right, and return their lengths.

    On the CPU: prompts are int64 [b, s], lengths int64 [b].
    """
    out = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
    for row, own in zip(out, prompts, strict=True):
        row[: len(own)] = torch.tensor(own)
    return out, torch.tensor([len(own) for own in prompts])


def _check(model: torch.nn.Module, prompts: Tensor, new_tokens: int) -> None:
    if prompts.dim() != 2 or prompts.dtype != torch.int64 or prompts.numel() == 0 or new_tokens < 0:
        raise ValueError(
            f"prompts must be int64 [b, s] with at least one token, and new_tokens at least 0, got {prompts.dtype}"
            f" {list(prompts.shape)} and {new_tokens}"
        )
    rows, (least, most) = unwrap(model).vocab_size, (int(prompts.min()), int(prompts.max()))
    if not 0 <= least <= most < rows:
        raise ValueError(f"prompts hold {least} to {most}: the model's tokens are 0 to {rows - 1}")
