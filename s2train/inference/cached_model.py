"""A GPTModel that reads a prompt in chunks and then goes on token by token, over a cache."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from s2train.inference.kv_cache import Chunk, KVCache


@dataclass(frozen=True)
class CapturedStep:
    """A step in a CUDA graph, which reads `tokens` and writes `logits`."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    logits: Tensor

    @classmethod
    def of(cls, step: Callable[[Tensor], Tensor], tokens: Tensor) -> "CapturedStep":
        """Capture without running; other threads, such as NCCL's, may go on meanwhile."""
        own, graph = tokens.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = step(own)
        return cls(graph, own, logits)

    def __call__(self, tokens: Tensor) -> Tensor:
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits.clone()


def hidden_states(gpt: GPTModel, tokens: Tensor, positions: Tensor, angles: Tensor) -> Tensor:
    """After the last layer, [s, b, hidden], of tokens and positions [b, s]; over a cache where one is attached."""
    embedded = gpt.embedding(input_ids=tokens, position_ids=positions)
    return gpt.decoder(hidden_states=embedded, attention_mask=None, rotary_pos_emb=angles)


class CachedModel:
    """Logits of the next token, with `cache` attached to `gpt` (see `kv_cache`).

    Positions and rotation count from each sequence's own beginning. Megatron's inference context is not used: it
    keeps every key, unrotated.

    Args:
        cuda_graph: run the first step of decoding as it is, capture the second, and replay it from then on, so that
            launches cost next to nothing. On a CPU it changes nothing.
    Raises:
        ValueError: the model's positions are not rotary.
    """

    def __init__(self, gpt: GPTModel, cache: KVCache, cuda_graph: bool = False) -> None:
        if gpt.position_embedding_type != "rope":
            raise ValueError(f"positions are {gpt.position_embedding_type}: cached decoding rotates (rope) only")
        self.gpt, self.cache = gpt, cache
        self._angles = gpt.rotary_pos_emb(cache.max_length)  # [max_length, 1, 1, d]
        self._steps = 0
        self._captures = cuda_graph and self._angles.is_cuda
        self._captured: CapturedStep | None = None

    @torch.no_grad()
    def prefill(self, tokens: Tensor, lengths: Tensor | None = None, chunk: int = 8192) -> Tensor:
        """Read the prompts of all sequences, from their beginning.

        Args:
            tokens: int64 [b, s]; shorter prompts are padded at the right, with any token.
            lengths: int [b], 1 to s: of the prompts; None: all s.
            chunk: tokens of a sequence that go through the model at once; rounded up to whole blocks.
        Returns:
            Logits [b, vocab] after each prompt's last token, float32.
        Raises:
            ValueError: something was read already, or shapes or lengths don't fit the cache.
            OutOfPagesError: the pool is too small.
        """
        cache, (batch, size) = self.cache, tokens.shape
        known = np.full(batch, size) if lengths is None else lengths.cpu().numpy().astype(np.int64)
        if cache.lengths.any() or cache.pool.used:
            raise ValueError("the cache holds tokens already: open another for new prompts")
        if batch != cache.batch_size or size > cache.max_length:
            raise ValueError(f"tokens {[batch, size]} don't fit a cache of {[cache.batch_size, cache.max_length]}")
        if known.shape != (batch,) or known.min() < 1 or known.max() > size or chunk < 1:
            raise ValueError(f"lengths must be {batch} of 1 to {size}, and chunk at least 1, got {known}, {chunk}")
        chunk = -(-chunk // cache.block_size) * cache.block_size
        last = torch.from_numpy(known - 1).to(tokens.device)
        ends = self._angles.new_zeros(())
        stop = int(known.max())
        for start in range(0, stop, chunk):
            end = min(start + chunk, stop)
            cache.chunk = Chunk(start, end, np.minimum(known, end))
            positions = torch.arange(start, end, device=tokens.device).expand(batch, -1)
            hidden = hidden_states(self.gpt, tokens[:, start:end], positions, self._angles[start:end])
            inside = (last >= start) & (last < end)
            at = (last - start).clamp(0, end - start - 1)
            ends = hidden[at, torch.arange(batch, device=at.device)].where(inside[:, None], ends.to(hidden.dtype))
        cache.end_prefill(known)
        return self._logits(ends[None])

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Logits [b, vocab], float32, after one more token a sequence, int64 [b]; those of finished ones mean nothing.

        Raises:
            ValueError: a sequence is full.
            OutOfPagesError: the pool is too small.
        """
        self.cache.begin_step()
        if self._captures and self._captured is None and self._steps > 0:  # kernels and walks are made by now
            self._captured = CapturedStep.of(self._step, tokens)
        logits = self._step(tokens) if self._captured is None else self._captured(tokens)
        self.cache.end_step()
        self._steps += 1
        return logits

    def _step(self, tokens: Tensor) -> Tensor:
        """Device work of one step: nothing in it is read on the host."""
        positions = self.cache.positions.clamp(min=0).long()
        angles = self._angles[positions].transpose(0, 1)  # [1, b, 1, d]: rotation broadcasts over heads
        return self._logits(hidden_states(self.gpt, tokens[:, None], positions[:, None], angles))

    def _logits(self, hidden: Tensor) -> Tensor:
        """[b, vocab] of [1, b, hidden], gathered over tensor parallel ranks."""
        gpt = self.gpt
        shared = gpt.shared_embedding_or_output_weight() if gpt.share_embeddings_and_output_weights else None
        logits, _ = gpt.output_layer(hidden, weight=shared, runtime_gather_output=True)
        return logits[0].float()
