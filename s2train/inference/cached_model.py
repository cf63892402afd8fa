"""Runs a GPTModel over a KV cache: prefill in chunks, then decoding."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from s2train.inference.kv_cache import Chunk, KVCache
from s2train.megatron.core_attention import cores_of

_LOGIT_ROWS = 1024  # tokens whose logits are computed at once


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
        if cuda_graph and not all(core.captures_decoding for core in cores_of(gpt)):
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
        """
        known, last = self._open(tokens, lengths)
        rows, ends = torch.arange(len(known), device=tokens.device), self._angles.new_zeros(())
        for start, end, hidden in self._chunks(tokens, known, chunk):
            inside = (last >= start) & (last < end)
            at = (last - start).clamp(0, end - start - 1)
            ends = hidden[at, rows].where(inside[:, None], ends.to(hidden.dtype))
        return self._logits(ends[None])

    @torch.no_grad()
    def losses(
        self, tokens: Tensor, targets: Tensor, lengths: Tensor | None = None, chunk: int = 8192
    ) -> tuple[Tensor, Tensor]:
        """Process whole sequences, and compute how well each next token is predicted.

        Logits of about a thousand tokens exist at a time.

        Args:
            tokens, lengths, chunk: as for `prefill`.
            targets: int64 [b, s]: the token after each.
        Returns:
            Negative log-likelihoods of the targets, in nats, float32 [b, s], and whether each is the likeliest token,
            bool [b, s]. Both are meaningless from a sequence's length on.
        Raises:
            ValueError: as for `prefill`.
        """
        known, _ = self._open(tokens, lengths)
        found = torch.zeros(tokens.shape, device=tokens.device)
        likeliest = torch.zeros_like(found, dtype=torch.bool)
        for start, end, hidden in self._chunks(tokens, known, chunk):
            found[:, start:end], likeliest[:, start:end] = _token_losses(self.gpt, hidden, targets[:, start:end])
        return found, likeliest

    def _open(self, tokens: Tensor, lengths: Tensor | None) -> tuple[np.ndarray, Tensor]:
        """Check prompts against the empty cache.

        Returns their lengths, and the positions of their last tokens.
        """
        cache, (batch, size) = self.cache, tokens.shape
        known = np.full(batch, size) if lengths is None else lengths.cpu().numpy().astype(np.int64)
        if cache.lengths.any() or cache.pool.used:
            raise ValueError("the cache already holds tokens: open another one for new prompts")
        if batch != cache.batch_size or size > cache.max_length:
            raise ValueError(f"tokens {[batch, size]} don't fit a cache of {[cache.batch_size, cache.max_length]}")
        if known.shape != (batch,) or known.min() < 1 or known.max() > size:
            raise ValueError(f"lengths must be {batch} values from 1 to {size}, got {known}")
        return known, torch.from_numpy(known - 1).to(tokens.device)

    def _chunks(self, tokens: Tensor, known: np.ndarray, chunk: int) -> Iterator[tuple[int, int, Tensor]]:
        """Run the prompts through the model and into the cache.

        Yields:
            A chunk's first position, one past its last, and its hidden states [s, b, hidden].
        """
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        cache, stop = self.cache, int(known.max())
        chunk = -(-chunk // cache.block_size) * cache.block_size
        for start in range(0, stop, chunk):
            end = min(start + chunk, stop)
            cache.chunk = Chunk(start, end, np.minimum(known, end))
            positions = torch.arange(start, end, device=tokens.device).expand(len(known), -1)
            yield start, end, hidden_states(self.gpt, tokens[:, start:end], positions, self._angles[start:end])
        cache.end_prefill(known)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Process one more token of each sequence.

        Args:
            tokens: int64 [b].
        Returns:
            Logits, float32 [b, vocab]; those of finished sequences are meaningless.
        Raises:
            ValueError: a sequence is full.
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
        """Compute logits [b, vocab], gathered over tensor parallel ranks.

        Hidden states are [1, b, hidden].
        """
        return _all_logits(self.gpt, hidden)[0]


@torch.no_grad()
def uncached_losses(gpt: GPTModel, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute losses in one forward pass without a cache.

    It uses the attention of training.

    Args and Returns: as for `CachedModel.losses`; padding on the right changes nothing before it.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return _token_losses(gpt, hidden_states(gpt, tokens, positions, gpt.rotary_pos_emb(tokens.shape[1])), targets)


def _token_losses(gpt: GPTModel, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return each target's loss, and whether it is the likeliest token.

    Hidden states are [s, b, hidden]; both results are [b, s], losses in float32.
    """
    found = torch.zeros(targets.shape, device=targets.device)
    likeliest = torch.zeros_like(found, dtype=torch.bool)
    rows = max(1, _LOGIT_ROWS // len(targets))
    for first in range(0, len(hidden), rows):
        logits = _all_logits(gpt, hidden[first : first + rows])  # [n, b, vocab]
        wanted = targets[:, first : first + rows].T
        own = logits.gather(-1, wanted[..., None]).squeeze(-1)
        found[:, first : first + rows] = (logits.logsumexp(-1) - own).T
        likeliest[:, first : first + rows] = (logits.argmax(-1) == wanted).T
    return found, likeliest


def _all_logits(gpt: GPTModel, hidden: Tensor) -> Tensor:
    """Compute logits, gathered over tensor parallel ranks.

    Hidden states are [s, b, hidden]; logits are float32 [s, b, vocab].
    """
    shared = gpt.shared_embedding_or_output_weight() if gpt.share_embeddings_and_output_weights else None
    logits, _ = gpt.output_layer(hidden, weight=shared, runtime_gather_output=True)
    return logits.float()
