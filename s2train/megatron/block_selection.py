"""Core attention over key blocks that a scorer selects."""

from collections.abc import Sequence

import torch
from torch import Tensor

from s2train.attention.block_selection import FIRST_TOKEN, BlockSelectionKind
from s2train.attention.hybrid import dense_layer
from s2train.attention.kind import LayerLayout
from s2train.attention.selection.lists import row_chunks, select
from s2train.attention.selection.mixing import mix, running_means
from s2train.attention.selection.scorer import precise
from s2train.kernels.attention import Backend, block_sparse_attention
from s2train.kernels.block_statistics import block_mass
from s2train.kernels.dispatch import kernels_in_use
from s2train.kernels.topk_layout import Layout, TopKLayout
from s2train.megatron.context_parallel.all_gather import chunk_ids, gather_sequence
from s2train.megatron.core_attention import AttentionCache
from s2train.megatron.selecting_core import SelectingCoreAttention, joined
from s2train.megatron.selection_cache import (
    cached_list,
    cached_lists,
    empty_state,
    keep_chunk,
    keep_token,
    mean_with_token,
    pooled_keys,
    whole_blocks,
)
from s2train.megatron.selection_losses import QueryPart, learn_from_all, learn_from_sampled


class BlockSelectionCoreAttention(SelectingCoreAttention):
    """Core attention of the kind `block_selection`.

    During the run's first `warm_up_steps` steps it is dense, and the scorer learns from the probabilities of all rows.
    Afterwards it reads selected blocks, and the scorer learns from those of a few sampled rows. Under context parallel,
    keys, features of blocks, and the queries that choose are gathered from all ranks.
    """

    captures_decoding = True

    @property
    def warms_up(self) -> bool:
        """Return whether this step is dense.

        No step is dense outside of training (step 0) or over a cache.
        """
        return self.training and self.kv is None and 1 <= self.step <= self.kind.settings.warm_up_steps

    @classmethod
    def compile_kernels(
        cls, layer: LayerLayout, query: Tensor, key: Tensor, value: Tensor, query_offset: int, backend: Backend,
        documents: bool = False,
    ) -> None:  # fmt: skip
        """Run the sparse op over lists, and what a warm-up runs.

        A warm-up has dense steps; without one, only the sparse op runs.
        """
        kind, num_heads = layer.kind, query.shape[2]
        assert isinstance(kind, BlockSelectionKind)
        count, before = layer.num_blocks(key.shape[0]), query_offset // layer.block_size
        rows, lists = torch.arange(count, device=query.device)[None, None], []
        for first, end in row_chunks(before, count):
            scores = torch.zeros(query.shape[1], key.shape[2], 1, end - first, end, device=query.device)
            own, slots = rows[..., first:end], kind.budget.most_chosen(count)
            lists.append(select(scores, own, kind.budget, slots, normalize=kind.scorer.normalizes, backend=backend))
        indices = after_rows(joined(lists, 2), before)
        layouts: list[Layout] = [TopKLayout.from_indices(indices, layer.block_size, num_heads=num_heads)]
        if kind.settings.warm_up_steps:
            layouts.append(dense_layer(num_heads, layer.block_size).block_layout(key.shape[0], device=query.device))
        for layout in layouts:
            out, lse = block_sparse_attention(
                query, key, value, layout, query_offset=query_offset, return_lse=True, backend=backend
            )
            out.backward(torch.ones_like(out))
        if kind.settings.warm_up_steps:
            block_mass(
                query.detach(), key.detach(), lse.detach(), block_size=layer.block_size, query_offset=query_offset,
                backend=backend,
            )  # fmt: skip

    def attend(self, query: Tensor, key: Tensor, value: Tensor, query_offset: int) -> Tensor:
        if query_offset:
            return self.attend_later(query, key, value, query_offset)
        with torch.set_grad_enabled(self.learns):
            block_queries, features = self.block_queries(self._for_scorer(query)), self.features(self._for_scorer(key))
        return self.attend_parts([QueryPart(query, 0)], key, value, block_queries, features)

    def attend_across_ranks(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute attention of this context parallel rank's two chunks, as `attend`.

        Chunks are whole blocks. All keys are gathered, and what each rank pools of its blocks.
        """
        group, size = self.cp_group, self.layer_layout.block_size
        with torch.set_grad_enabled(self.learns):
            pooled = self.pooled_queries(self._for_scorer(query)), pooled_keys(self, self._for_scorer(key))
            of_blocks, features = (gather_sequence(x.transpose(0, 1), group).transpose(0, 1) for x in pooled)
            block_queries = self.block_queries_of(of_blocks, features.shape[1])
        key, value = gather_sequence(key, group), gather_sequence(value, group)
        tokens = len(query) // 2
        assert tokens % size == 0, "context parallel splits a block"
        chunks = zip(chunk_ids(group.rank(), group.size()), query.chunk(2), strict=True)
        parts = [QueryPart(part, chunk * tokens) for chunk, part in chunks]
        return self.attend_parts(parts, key, value, block_queries, features)

    def _for_scorer(self, x: Tensor) -> Tensor:
        """Detach queries or keys unless the trunk learns from the scorer."""
        return x if self.kind.settings.trunk_gradient else x.detach()

    def attend_later(self, query: Tensor, key: Tensor, value: Tensor, query_offset: int) -> Tensor:
        """Compute attention of a prompt's chunk over cached keys and itself."""
        if self.kv is None:
            raise NotImplementedError("queries without those before them, which choose what they read")
        num_blocks, first = self.layer_layout.num_blocks(key.shape[0]), query_offset // self.layer_layout.block_size
        rows = torch.arange(first, num_blocks, device=query.device)[None, None]
        indices = cached_lists(self, self.kv, rows, num_blocks)
        out = block_sparse_attention(
            query, key, value, self.layout_of(indices, query, first), softmax_scale=self.softmax_scale,
            query_offset=query_offset, backend=self.backend,
        )  # fmt: skip
        return self.mixed(out, query, value)

    def attend_parts(
        self, parts: Sequence[QueryPart], key: Tensor, value: Tensor, block_queries: Tensor, features: Tensor
    ) -> Tensor:
        """Compute attention of parts of a sequence, and attach the scorer's losses.

        Args:
            key, value: [s, b, h_kv, d], of the whole sequence.
            block_queries, features: of all blocks, as `block_queries` and `features` return them.
        """
        size, lses = self.layer_layout.block_size, list[Tensor]()
        outs, lists = [], list[Tensor]()
        for part in parts:
            if not self.warms_up:
                first, end = part.offset // size, self.layer_layout.num_blocks(part.end)
                lists.append(self.lists(block_queries, features, first, end))
            out, lse = self.attend_part(part, key[: part.end], value[: part.end], lists[-1] if lists else None)
            outs.append(out)
            if lse is not None:
                lses.append(lse)
        out = joined(outs, 0)
        if not self.learns and not (torch.is_grad_enabled() and self.is_logged):
            return out
        detached, key = [QueryPart(part.query.detach(), part.offset) for part in parts], key.detach()
        if self.warms_up:
            return learn_from_all(self, out, detached, key, lses, block_queries, features)
        return learn_from_sampled(self, out, detached, key, block_queries, features, joined(lists, 2))

    def attend_part(
        self, part: QueryPart, key: Tensor, value: Tensor, indices: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute a part's output, and the log-sum-exp if this step is dense.

        The last query is at the position of the last key. `indices` are the lists of the part's blocks; a dense step
        has none.
        """
        query, offset = part.query, part.offset
        if indices is None:
            dense = dense_layer(self.shape.num_heads, self.layer_layout.block_size)
            layout: Layout = self.cache.get(dense, key.shape[0], self.heads, query.device)
        else:
            layout = self.layout_of(indices, query, offset // self.layer_layout.block_size)
        if self.kernels is None:
            self.kernels = kernels_in_use(query, key, value, layout, query_offset=offset, backend=self.backend)
        scale, backend = self.softmax_scale, self.backend
        if self.warms_up:
            out, lse = block_sparse_attention(
                query, key, value, layout, softmax_scale=scale, query_offset=offset, return_lse=True, backend=backend
            )
            return self.mixed(out, query, value), lse.detach()
        out = block_sparse_attention(
            query, key, value, layout, softmax_scale=scale, query_offset=offset, backend=backend
        )
        return self.mixed(out, query, value), None

    def attend_cached(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert self.kv is not None
        chunk = self.kv.chunk
        if chunk is not None:
            keep_chunk(self, self.kv, query, key, value, chunk)
            return self.kv.attend_chunk(query, key, value)
        self.kv.append(key, value)
        keep_token(self, self.kv, query)
        out = self.kv.attend_listed(query, cached_list(self, self.kv))
        if self.kind.settings.mix_mean:
            out = mix(out, query, mean_with_token(self.kv, value), self.weight)
        return out

    def cached_layout(self, max_length: int, device: torch.device) -> None:
        return None  # any block may be selected later

    def cached_state(self, batch_size: int, num_blocks: int, device: torch.device) -> dict[str, Tensor]:
        return empty_state(self, batch_size, num_blocks, device)

    def cached_reads(self, kv: AttentionCache, block: int, page_bytes: int) -> int:
        pages = self.kind.budget.num_kept(block) * page_bytes + page_bytes // 2  # its own block's keys once more
        block_queries, features = kv.state["block_queries"][0], kv.state["features"][0]
        rows = self.kind.scorer.earlier_rows + 1
        state = features.nbytes + rows * block_queries[0].nbytes
        if self.kind.settings.mix_mean:
            state += kv.state["value_sums"][0].nbytes
        return self.num_kv_heads * pages + state

    def mixed(self, out: Tensor, query: Tensor, value: Tensor) -> Tensor:
        """Mix the output with means of values, if the kind does.

        The last query is at the position of the last value.
        """
        if not self.kind.settings.mix_mean:
            return out
        means = running_means(value, self.layer_layout.block_size)[value.shape[0] - query.shape[0] :]
        return mix(out, query, means, self.weight)

    def layout_of(self, indices: Tensor, query: Tensor, before: int) -> TopKLayout:
        """Make the layout of lists [b, h_kv, n, slots].

        `before` query blocks come before those of the lists.
        """
        return TopKLayout.from_indices(
            after_rows(indices, before), self.layer_layout.block_size, num_heads=query.shape[2]
        )

    def features(self, key: Tensor) -> Tensor:
        """Pool the keys of complete blocks: [b, n, h_kv, f].

        A partial block, which is never selected, has zeros.
        """
        found = pooled_keys(self, key)
        missing = self.layer_layout.num_blocks(key.shape[0]) - found.shape[1]
        return torch.nn.functional.pad(found, (0, 0, 0, 0, 0, missing))

    def block_queries(self, query: Tensor) -> Tensor:
        """Pool the query that chooses for each block: [b, n, h, d].

        The tokens of a query block are never pooled together to choose for it.
        """
        count = self.layer_layout.num_blocks(query.shape[0])
        return self.block_queries_of(self.pooled_queries(query), count)

    def pooled_queries(self, query: Tensor) -> Tensor:
        """Take each block's first query, or each complete block's mean.

        The result is [b, n, h, d].
        """
        size = self.layer_layout.block_size
        if self.kind.settings.queries == FIRST_TOKEN:
            return query[::size].transpose(0, 1).to(precise(query.dtype))
        return whole_blocks(query, size).mean(2, dtype=precise(query.dtype))

    def block_queries_of(self, pooled: Tensor, count: int) -> Tensor:
        """Give each of `count` blocks the pooled query that chooses for it.

        A mean chooses for the block after its own; none chooses for the first.
        """
        if self.kind.settings.queries == FIRST_TOKEN:
            return pooled
        return torch.nn.functional.pad(pooled[:, : count - 1], (0, 0, 0, 0, 1, 0))


def after_rows(indices: Tensor, count: int) -> Tensor:
    """Put `count` empty lists before lists [b, h_kv, n, slots]."""
    return torch.nn.functional.pad(indices, (0, 0, count, 0), value=-1) if count else indices
