"""Runs a GPTModel over a KV cache: prefill in chunks, then decoding."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from s2train.inference.kv_cache import Chunk, KVCache
from s2train.megatron.core_attention import CausalCoreAttention


@dataclass(frozen=True)
class CapturedStep:
    """A decoding step in a CUDA graph.

    It reads `tokens` and writes `logits`.
    """

    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    logits: Tensor

    @classmethod
    def of(cls, step: Callable[[Tensor], Tensor], tokens: Tensor) -> "CapturedStep":
        """Capture a step without running it.

        Other threads, such as NCCL's, may continue.
        """
        own, graph = tokens.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = step(own)
        return cls(graph, own, logits)

    def __call__(self, tokens: Tensor) -> Tensor:
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits.clone()


def hidden_states(gpt: GPTModel, tokens: Tensor, positions: Tensor, angles: Tensor) -> Tensor:
    """Compute hidden states after the last layer.

    Uses the cache if one is attached.

    Args:
        tokens, positions: [b, s].
    Returns:
        [s, b, hidden].
    """
    embedded = gpt.embedding(input_ids=tokens, position_ids=positions)
    return gpt.decoder(hidden_states=embedded, attention_mask=None, rotary_pos_emb=angles)


class CachedModel:
    """Computes logits of the next token over a cache.

    `cache` is attached to `gpt`, see `kv_cache`. Positions and rotation count from the beginning of each sequence.
    Megatron's inference context is not used, because it keeps every key, unrotated.

    Args:
        cuda_graph: run the first decoding step eagerly, capture the second in a CUDA graph, and replay it from then on,
            which removes launch overhead. Has no effect on a CPU.
    Raises:
        ValueError: the model's positions are not rotary, or a layer can't be captured.
    """

    def __init__(self, gpt: GPTModel, cache: KVCache, cuda_graph: bool = False) -> None:
        if gpt.position_embedding_type != "rope":
            raise ValueError(f"positions are {gpt.position_embedding_type}: cached decoding supports rope only")
        if cuda_graph and not all(m.captures_decoding for m in gpt.modules() if isinstance(m, CausalCoreAttention)):
            raise ValueError("a layer's kind of attention decodes with the host's help: set cuda_graph=False")
        self.gpt, self.cache = gpt, cache
        self._angles = gpt.rotary_pos_emb(cache.max_length)  # [max_length, 1, 1, d]
        self._steps = 0
        self._captures = cuda_graph and self._angles.is_cuda
        self._captured: CapturedStep | None = None

    @torch.no_grad()
    def prefill(self, tokens: Tensor, lengths: Tensor | None = None, chunk: int = 8192) -> Tensor:
        """Process the prompts of all sequences from their beginning.

        Args:
            tokens: int64 [b, s]; shorter prompts are padded on the right with any token.
            lengths: int [b], 1 to s: lengths of the prompts; None: all s.
            chunk: tokens of a sequence that go through the model at once; rounded up to whole blocks.
        Returns:
            Logits after each prompt's last token, float32 [b, vocab].
        Raises:
            ValueError: the cache is not empty, or shapes or lengths don't fit it.
            OutOfPagesError: the pool is too small.
        """
        cache, (batch, size) = self.cache, tokens.shape
        known = np.full(batch, size) if lengths is None else lengths.cpu().numpy().astype(np.int64)
        if cache.lengths.any() or cache.pool.used:
            raise ValueError("the cache already holds tokens: open another one for new prompts")
        if batch != cache.batch_size or size > cache.max_length:
            raise ValueError(f"tokens {[batch, size]} don't fit a cache of {[cache.batch_size, cache.max_length]}")
        if known.shape != (batch,) or known.min() < 1 or known.max() > size or chunk < 1:
            raise ValueError(
                f"lengths must be {batch} values from 1 to {size}, and chunk at least 1, got {known}, {chunk}"
            )
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
        """Process one more token of each sequence.

        Args:
            tokens: int64 [b].
        Returns:
            Logits, float32 [b, vocab]; those of finished sequences are meaningless.
        Raises:
            ValueError: a sequence is full.
            OutOfPagesError: the pool is too small.
        """
        self.cache.begin_step()
        if self._captures and self._captured is None and self._steps > 0:  # kernels and schedules exist by now
            self._captured = CapturedStep.of(self._step, tokens)
        logits = self._step(tokens) if self._captured is None else self._captured(tokens)
        self.cache.end_step()
        self._steps += 1
        return logits

    def _step(self, tokens: Tensor) -> Tensor:
        """Run one step on the device, without reading anything on the host."""
        positions = self.cache.positions.clamp(min=0).long()
        angles = self._angles[positions].transpose(0, 1)  # [1, b, 1, d]: rotation broadcasts over heads
        return self._logits(hidden_states(self.gpt, tokens[:, None], positions[:, None], angles))

    def _logits(self, hidden: Tensor) -> Tensor:
        """Compute logits [b, vocab] from [1, b, hidden], gathered over tensor parallel ranks."""
        gpt = self.gpt
        shared = gpt.shared_embedding_or_output_weight() if gpt.share_embeddings_and_output_weights else None
        logits, _ = gpt.output_layer(hidden, weight=shared, runtime_gather_output=True)
        return logits[0].float()
