"""Core attention of the kind `hyper`."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from s2train.attention.hybrid import dense_layer
from s2train.attention.hyper import HyperKind
from s2train.attention.kind import LayerLayout
from s2train.kernels.attention import Backend, block_sparse_attention
from s2train.kernels.dense import dense_causal_attention
from s2train.kernels.hyper import hyper_attention
from s2train.kernels.transfer import to_device
from s2train.megatron.core_attention import CausalCoreAttention, PackedDocuments


class HyperCoreAttention(CausalCoreAttention):
    """HyperAttention in training, exact attention over all cached keys in decoding.

    One exact query reads as many keys as hashing them again would.
    """

    captures_decoding = True

    @classmethod
    def compile_kernels(
        cls, layer: LayerLayout, query: Tensor, key: Tensor, value: Tensor, query_offset: int, backend: Backend,
        documents: bool = False,
    ) -> None:  # fmt: skip
        """Run the op once, forward and backward.

        With `documents` it runs on one sequence, and the sparse op too, as short documents do.
        """
        assert isinstance(layer.kind, HyperKind)
        seeds = torch.zeros(key.shape[2], dtype=torch.int64, device=query.device)
        if documents:
            query, key, value = query[:, :1], key[:, :1], value[:, :1]
            dense = dense_layer(query.shape[2], layer.block_size).block_layout(len(key), device=query.device)
            bounds = torch.tensor([0, len(key)], dtype=torch.int32, device=query.device)
            out = block_sparse_attention(query, key, value, dense, cu_seqlens=bounds, backend=backend)
            out.backward(torch.ones_like(out))
        out = hyper_attention(query, key, value, layer.kind.op_settings, seeds, seeds, backend=backend)
        out.backward(torch.ones_like(out))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, query_offset: int) -> Tensor:
        if self.kv is not None:
            return dense_causal_attention(
                query, key, value, softmax_scale=self.softmax_scale, query_offset=query_offset
            )
        assert query_offset == 0, "only a cache brings earlier keys"
        kind = self.layer_layout.kind
        assert isinstance(kind, HyperKind)
        return hyper_attention(
            query,
            key,
            value,
            kind.op_settings,
            self._seeds("projections", query.device, each_step=not kind.settings.fixed_projections),
            self._seeds("samples", query.device),
            softmax_scale=self.softmax_scale,
            backend=self.backend,
        )

    def attend_documents(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        """Compute attention within each document of [s, b, h, d].

        Intervals restart in each. Documents of one interval are exact: neighbours of them are one call.
        """
        if not isinstance(packed, PackedDocuments) or self.kv is not None or self.cp_group.size() > 1:
            raise NotImplementedError("packed documents come as packed_documents makes them")
        assert isinstance(self.layer_layout.kind, HyperKind)
        runs = _runs_of_sequences(packed, self.layer_layout.kind.settings.shortest)
        every = dense_layer(self.shape.num_heads, self.layer_layout.block_size)
        dense = self.cache.get(every, key.shape[0], self.heads, query.device)
        sequences = []
        for sequence, of_sequence in enumerate(runs):
            lengths = [run.length for run in of_sequence]
            split = [x[:, sequence, None].split(lengths) for x in (query, key, value)]
            parts = []
            for run, q, k, v in zip(of_sequence, *split, strict=True):
                if run.bounds is None:
                    parts.append(self.attend(q, k, v, 0))
                    continue
                parts.append(
                    block_sparse_attention(
                        q, k, v, dense, softmax_scale=self.softmax_scale, cu_seqlens=run.bounds, backend=self.backend
                    )
                )
            sequences.append(torch.cat(parts))
        return torch.cat(sequences, 1)

    def attend_cached(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert self.kv is not None
        return self.kv.attend(query, key, value)

    def cached_layout(self, max_length: int, device: torch.device) -> None:
        return None

    def _seeds(self, purpose: str, device: torch.device, *, each_step: bool = True) -> Tensor:
        """Return each KV head's seed: that of its first query head.

        Ranks that share a KV head get the same one.
        """
        first, last = self.heads
        group = self.shape.num_heads // self.shape.num_query_groups
        heads = range(first // group * group, last, group)
        seeds = [self.random_seed(head - first, purpose, each_step=each_step) for head in heads]
        return to_device(torch.tensor(seeds, dtype=torch.int64), device)  # else the host would wait in every layer


@dataclass(frozen=True)
class _Run:
    """Neighbouring documents in one call.

    Attributes:
        length: tokens of all.
        bounds: int32 [documents + 1] from 0, on the device; None: one longer document.
    """

    length: int
    bounds: Tensor | None


def _runs_of_sequences(packed: PackedDocuments, shortest: int) -> list[list[_Run]]:
    """Find each sequence's runs, once for all layers."""
    key = ("hyper", shortest)
    if key not in packed.derived:
        packed.derived[key] = [
            [_run(ends, bounds, first, last, shortest) for first, last in document_runs(ends, shortest)]
            for ends, bounds in zip(packed.on_host, packed.on_device, strict=True)
        ]
    found: list[list[_Run]] = packed.derived[key]
    return found


def _run(ends: Sequence[int], bounds: Tensor, first: int, last: int, shortest: int) -> _Run:
    length = ends[last] - ends[first]
    is_longer = length > shortest and last - first == 1
    return _Run(length, None if is_longer else bounds[first : last + 1] - ends[first])


def document_runs(ends: Sequence[int], shortest: int) -> list[tuple[int, int]]:
    """Group documents: each longer one alone, the others with their neighbours.

    Args:
        ends: a sequence's bounds; documents may be empty.
        shortest: tokens up to which a document is no longer one.
    Returns:
        Ranges [first, last) of documents, none without tokens.
    """
    runs: list[tuple[int, int]] = []
    open_run = False
    for number, (begin, end) in enumerate(pairwise(ends)):
        longer = end - begin > shortest
        if open_run and not longer:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
        open_run = not longer
    return [(first, last) for first, last in runs if ends[last] > ends[first]]
