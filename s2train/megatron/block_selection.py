"""Core attention over key blocks that a scorer selects."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from s2train.attention.block_selection import FIRST_TOKEN, BlockSelectionKind
from s2train.attention.kind import LayerLayout
from s2train.attention.random_numbers import stateless_seed
from s2train.attention.registry import LETTERS
from s2train.attention.selection.lists import listed, row_chunks, select
from s2train.attention.selection.mixing import mix, running_means
from s2train.attention.selection.scorer import block_scores, precise
from s2train.attention.selection.targets import LOSSES, row_mass, sampled_positions
from s2train.kernels.attention import Backend, block_sparse_attention
from s2train.kernels.block_statistics import block_mass
from s2train.kernels.block_statistics.blocks import rows_of_block
from s2train.kernels.dispatch import kernels_in_use
from s2train.kernels.select_blocks import combine_heads
from s2train.kernels.topk_layout import Layout, TopKLayout
from s2train.layouts.patterns import Dense
from s2train.megatron.core_attention import AttentionCache, CausalCoreAttention
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


class BlockSelectionCoreAttention(CausalCoreAttention):
    """Core attention of the kind `block_selection`.

    During the run's first `warm_up_steps` steps it is dense, and the scorer learns from the probabilities of all rows.
    Afterwards it reads selected blocks, and the scorer learns from those of a few sampled rows.
    """

    captures_decoding = True

    @property
    def params_dtype(self) -> torch.dtype:
        """Dtype of the model's weights, queries and keys."""
        config = self.config
        assert isinstance(config, TransformerConfig)
        return config.params_dtype

    @property
    def kind(self) -> BlockSelectionKind:
        kind = self.layer_layout.kind
        assert isinstance(kind, BlockSelectionKind)
        return kind

    @property
    def warms_up(self) -> bool:
        """Return whether this step is dense.

        No step is dense outside of training (step 0) or over a cache.
        """
        return self.training and self.kv is None and 1 <= self.step <= self.kind.settings.warm_up_steps

    @classmethod
    def compile_kernels(
        cls, layer: LayerLayout, query: Tensor, key: Tensor, value: Tensor, query_offset: int, backend: Backend
    ) -> None:
        """Run the sparse op over lists, and what a warm-up runs.

        A warm-up has dense steps; without one, only the sparse op runs.
        """
        kind, num_heads = layer.kind, query.shape[2]
        assert isinstance(kind, BlockSelectionKind)
        count = layer.num_blocks(key.shape[0])
        rows, lists = torch.arange(count, device=query.device)[None, None], []
        for first, end in row_chunks(count):
            scores = torch.zeros(query.shape[1], key.shape[2], 1, end - first, end, device=query.device)
            own, slots = rows[..., first:end], kind.budget.most_chosen(count)
            lists.append(select(scores, own, kind.budget, slots, normalize=kind.scorer.normalizes, backend=backend))
        indices = torch.cat(lists, 2)
        layouts: list[Layout] = [TopKLayout.from_indices(indices, layer.block_size, num_heads=num_heads)]
        if kind.settings.warm_up_steps:
            layouts.append(dense_layer(num_heads, layer.block_size).block_layout(key.shape[0], device=query.device))
        for layout in layouts:
            out, lse = block_sparse_attention(query, key, value, layout, return_lse=True, backend=backend)
            out.backward(torch.ones_like(out))
        if kind.settings.warm_up_steps:
            block_mass(query.detach(), key.detach(), lse.detach(), block_size=layer.block_size, backend=backend)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, query_offset: int) -> Tensor:
        num_blocks, first = self.layer_layout.num_blocks(key.shape[0]), query_offset // self.layer_layout.block_size
        rows = torch.arange(first, num_blocks, device=query.device)[None, None]
        if query_offset:
            if self.kv is None:
                raise NotImplementedError("queries without those before them, which choose what they read")
            indices = cached_lists(self, self.kv, rows, num_blocks)
            indices = torch.nn.functional.pad(indices, (0, 0, first, 0), value=-1)  # lists of the earlier rows
            layout: Layout = self.layout_of(indices, query)
            out = block_sparse_attention(
                query, key, value, layout, softmax_scale=self.softmax_scale, query_offset=query_offset,
                backend=self.backend,
            )  # fmt: skip
            return self.mixed(out, query, value)
        learns = torch.is_grad_enabled() and bool(self.kind.scorer.losses)
        chosen_by = (query, key) if self.kind.settings.trunk_gradient else (query.detach(), key.detach())
        with torch.set_grad_enabled(learns):
            speakers, features = self.speakers(chosen_by[0]), self.features(chosen_by[1])
        if self.warms_up:
            dense = dense_layer(self.shape.num_heads, self.layer_layout.block_size)
            layout = self.cache.get(dense, key.shape[0], self.heads, query.device)
        else:
            indices = self.lists(speakers, features)
            layout = self.layout_of(indices, query)
        if self.kernels is None:
            self.kernels = kernels_in_use(query, key, value, layout, backend=self.backend)
        scale, backend, lse = self.softmax_scale, self.backend, None
        if self.warms_up:
            out, lse = block_sparse_attention(
                query, key, value, layout, softmax_scale=scale, return_lse=True, backend=backend
            )
        else:
            out = block_sparse_attention(query, key, value, layout, softmax_scale=scale, backend=backend)
        out = self.mixed(out, query, value)
        if not learns and not (torch.is_grad_enabled() and self.is_logged):
            return out
        query, key = query.detach(), key.detach()
        if lse is not None:
            scores, of_heads, scorer = None, None, self.kind.scorer
            if learns:
                candidates = self.kind.budget.candidates(rows, num_blocks)
                of_heads = scorer.head_scores(speakers, features, candidates, self.weight)
                scores = combine_heads(of_heads, candidates, scorer.normalizes)
            return self.learn_from_all(out, query, key, lse, scores, self.lists(speakers, features, of_heads))
        return self.learn_from_sampled(out, query, key, speakers, features, indices)

    def attend_cached(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert self.kv is not None
        chunk = self.kv.chunk
        if chunk is not None:
            keep_chunk(self, self.kv, query, key, value, chunk)
            return self.kv.attend_chunk(self, query, key, value, chunk)
        self.kv.append(self, key, value)
        keep_token(self, self.kv, query)
        out = self.kv.attend_listed(self, query, cached_list(self, self.kv))
        if self.kind.settings.mix_mean:
            out = mix(out, query, mean_with_token(self.kv, value), self.weight)
        return out

    def cached_layout(self, max_length: int, device: torch.device) -> None:
        return None  # any block may be selected later

    def cached_state(self, batch_size: int, num_blocks: int, device: torch.device) -> dict[str, Tensor]:
        return empty_state(self, batch_size, num_blocks, device)

    def cached_reads(self, kv: AttentionCache, block: int, page_bytes: int) -> int:
        pages = self.kind.budget.num_kept(block) * page_bytes + page_bytes // 2  # its own block's keys once more
        speakers, features = kv.state["speakers"][0], kv.state["features"][0]
        rows = self.kind.scorer.earlier_rows + 1
        state = features.nbytes + rows * speakers[0].nbytes
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

    @torch.no_grad()
    def lists(self, speakers: Tensor, features: Tensor, scores: Tensor | None = None) -> Tensor:
        """Select each query block's key blocks: int32 [b, h_kv, n, slots].

        Args:
            scores: of all rows, from the scorer's `head_scores`; None: computed for a chunk of rows at a time.
        """
        scorer, budget, count = self.kind.scorer, self.kind.budget, features.shape[1]
        rows = torch.arange(count, device=features.device)[None, None]
        candidates, slots, lists = budget.candidates(rows, count), budget.most_chosen(count), []
        for first, end in row_chunks(count):
            if scores is None:
                around = slice(max(0, first - scorer.earlier_rows), end)
                found = scorer.head_scores(
                    speakers[:, around], features[:, :end], candidates[:, :, around, :end], self.weight
                )[..., first - around.start :, :]
            else:
                found = scores[..., first:end, :end]
            own = rows[..., first:end]
            lists.append(select(found, own, budget, slots, normalize=scorer.normalizes, backend=self.backend))
        return torch.cat(lists, 2)

    def layout_of(self, indices: Tensor, query: Tensor) -> TopKLayout:
        """Make the layout of lists [b, h_kv, n, slots]."""
        return TopKLayout.from_indices(indices, self.layer_layout.block_size, num_heads=query.shape[2])

    def features(self, key: Tensor) -> Tensor:
        """Pool the keys of complete blocks: [b, n, h_kv, f].

        A partial block, which is never selected, has zeros.
        """
        found = pooled_keys(self, key)
        missing = self.layer_layout.num_blocks(key.shape[0]) - found.shape[1]
        return torch.nn.functional.pad(found, (0, 0, 0, 0, 0, missing))

    def speakers(self, query: Tensor) -> Tensor:
        """Pool the queries that choose for each block: [b, n, h, d].

        The tokens of a query block are never pooled together to choose for it.
        """
        size = self.layer_layout.block_size
        if self.kind.settings.queries == FIRST_TOKEN:
            return query[::size].transpose(0, 1).to(precise(query.dtype))
        count = self.layer_layout.num_blocks(query.shape[0])
        means = whole_blocks(query, size)[:, : count - 1].mean(2, dtype=precise(query.dtype))
        return torch.nn.functional.pad(means, (0, 0, 0, 0, 1, 0))

    def learn_from_all(
        self, out: Tensor, query: Tensor, key: Tensor, lse: Tensor, scores: Tensor | None, indices: Tensor
    ) -> Tensor:
        """Attach the losses of all rows of a dense step, as `learn`.

        `lse` is that of dense attention.
        """
        size, length, num_blocks = self.layer_layout.block_size, query.shape[0], indices.shape[2]
        target = block_mass(
            query, key, lse.detach(), block_size=size, softmax_scale=self.softmax_scale, backend=self.backend
        )
        rows = torch.arange(num_blocks, device=query.device)
        share = rows_of_block(length, 0, size, query.device) / length
        return self.learn(out, target, scores, indices, rows, share)

    def learn_from_sampled(
        self, out: Tensor, query: Tensor, key: Tensor, speakers: Tensor, features: Tensor, indices: Tensor
    ) -> Tensor:
        """Attach the losses of a few rows, as `learn`.

        Only these rows are scored with gradients.
        """
        size, length = self.layer_layout.block_size, query.shape[0]
        seed = stateless_seed(self.seed, self.step, self.layer_number, "rows")
        at = sampled_positions(length, self.kind.settings.sampled_rows, seed, query.device)
        target = row_mass(query[at], key, at, size, self.softmax_scale)
        rows = at // size
        scores = self.scores_of(rows, speakers, features) if self.kind.scorer.losses else None
        share = torch.full((len(at),), 1 / len(at), device=query.device)
        return self.learn(out, target, scores, indices[:, :, rows], rows, share)

    def scores_of(self, rows: Tensor, speakers: Tensor, features: Tensor) -> Tensor:
        """Score key blocks for query blocks `rows` [r]: [b, h_kv, r, n].

        The rows before each, on which its scores depend, are scored with it.
        """
        scorer, earlier = self.kind.scorer, self.kind.scorer.earlier_rows
        around = (rows[:, None] + torch.arange(-earlier, 1, device=rows.device)).flatten()
        candidates = self.kind.budget.candidates(around[None, None], features.shape[1])
        found = block_scores(scorer, speakers[:, around.clamp_min(0)], features, candidates, self.weight)
        return found[:, :, earlier :: earlier + 1]

    def learn(
        self, out: Tensor, target: Tensor, scores: Tensor | None, indices: Tensor, rows: Tensor, share: Tensor
    ) -> Tensor:
        """Attach the scorer's losses to `out`, and record the lists' recall.

        Args:
            target: true probability of key blocks, [b, h_kv, r, n].
            scores: [b, h_kv, r, n]; None: the scorer has no losses.
            indices: [b, h_kv, r, slots].
            rows: [r], the query blocks.
            share: [r], of the sequence's tokens, which a row stands for.
        """
        num_blocks = target.shape[-1]

        def mean(of_rows: Tensor) -> Tensor:
            """Return this rank's part of the mean.

            The mean is over sequences, tokens and KV heads.
            """
            return (of_rows * share).sum(-1).mean(0).sum() / self.shape.num_query_groups

        self.record("recall", mean((target * listed(indices, num_blocks)).sum(-1)))
        if scores is not None:
            candidates = self.kind.budget.candidates(rows[None, None], num_blocks)
            for name in self.kind.scorer.losses:
                out = self.add_loss(out, name, mean(LOSSES[name](scores, target, candidates)))
        return out


def dense_layer(num_heads: int, block_size: int) -> LayerLayout:
    """Make the layout of a layer that keeps every block."""
    return LayerLayout(LETTERS["D"], (Dense(),) * num_heads, block_size)
