"""Losses that scorers learn from, and the recall of their lists.

In dense steps the target is the true probability of all rows, afterwards that of a few sampled rows. It is that of the
layer's own attention, or of a teacher's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2train.attention.random_numbers import stateless_seed
from s2train.attention.selection.lists import listed
from s2train.attention.selection.scorer import block_scores
from s2train.attention.selection.targets import LOSSES, row_mass, sampled_positions
from s2train.kernels.block_statistics import block_mass
from s2train.kernels.block_statistics.blocks import rows_of_block
from s2train.kernels.candidates import combine_heads
from s2train.megatron.selecting_core import SelectingCoreAttention, joined


@dataclass(frozen=True)
class QueryPart:
    """Consecutive queries of a sequence, in whole blocks.

    Attributes:
        query: [s_q, b, h, d].
        offset: position of the first query.
    """

    query: Tensor
    offset: int

    @property
    def end(self) -> int:
        """Position after the last query."""
        return self.offset + len(self.query)


def learn_from_all(
    core: SelectingCoreAttention,
    out: Tensor,
    parts: Sequence[QueryPart],
    key: Tensor,
    lses: Sequence[Tensor],
    block_queries: Tensor,
    features: Tensor,
) -> Tensor:
    """Attach the losses of all rows of a dense step, as `learn`.

    A row's list and loss have the same scores.

    Args:
        parts, lses: this rank's queries, and the log-sum-exp of their dense attention.
    """
    taught = core.taught_target()
    size, budget, scorer = core.layer_layout.block_size, core.kind.budget, core.kind.scorer
    num_blocks, tokens = features.shape[1], sum(len(part.query) for part in parts)
    every = torch.arange(num_blocks, device=key.device)
    targets, scores, lists, rows, shares = [], [], [], [], []
    for part, lse in zip(parts, lses, strict=True):
        first, end = part.offset // size, core.layer_layout.num_blocks(part.end)
        target = mass_of_part(core, part, key, lse) if taught is None else taught
        missing = num_blocks - end  # later key blocks
        targets.append(torch.nn.functional.pad(target, (0, missing)) if missing else target)
        rows.append(every[first:end])
        shares.append(rows_of_block(len(part.query), part.offset, size, key.device) / tokens)
        of_heads = None
        if core.learns:
            start = max(0, first - scorer.earlier_rows)
            candidates = budget.candidates(every[None, None, start:end], num_blocks)
            of_heads = scorer.head_scores(block_queries[:, start:end], features, candidates, core.weight)
            of_heads, candidates = of_heads[..., first - start :, :], candidates[..., first - start :, :]
            scores.append(combine_heads(of_heads, candidates, scorer.normalizes))
        lists.append(core.lists(block_queries, features, first, end, of_heads))
    of_parts = joined(scores, 2) if scores else None
    return learn(core, out, joined(targets, 2), of_parts, joined(lists, 2), joined(rows, 0), joined(shares, 0))


def mass_of_part(core: SelectingCoreAttention, part: QueryPart, key: Tensor, lse: Tensor) -> Tensor:
    """Compute the probability of key blocks for all rows of a part.

    The result is [b, h_kv, n, blocks up to the part's end].

    Args:
        lse: log-sum-exp of the part's dense attention.
    """
    return block_mass(
        part.query, key[: part.end], lse, block_size=core.layer_layout.block_size, softmax_scale=core.softmax_scale,
        query_offset=part.offset, backend=core.backend,
    )  # fmt: skip


def learn_from_sampled(
    core: SelectingCoreAttention,
    out: Tensor,
    parts: Sequence[QueryPart],
    key: Tensor,
    block_queries: Tensor,
    features: Tensor,
    indices: Tensor,
) -> Tensor:
    """Attach the losses of a few rows, as `learn`.

    Only these rows are scored with gradients. Each part has its share of the sequence's samples.
    """
    size, length = core.layer_layout.block_size, key.shape[0]
    drawn = drawn_positions(core, length, key.device)
    queries, positions, places, listed_before = [], [], [], 0
    for part in parts:
        first, end = (at * len(drawn) // length for at in (part.offset, part.end))
        at = drawn[first:end].clamp(part.offset, part.end - 1)
        queries.append(part.query[at - part.offset])
        positions.append(at)
        places.append(at // size - part.offset // size + listed_before)
        listed_before += core.layer_layout.num_blocks(len(part.query))
    at = joined(positions, 0)
    target = core.taught_target()
    if target is None:
        target = row_mass(joined(queries, 0), key, at, size, core.softmax_scale)
    rows = at // size
    scores = scores_of(core, rows, block_queries, features) if core.learns else None
    share = torch.full((len(at),), 1 / len(at), device=key.device)
    return learn(core, out, target, scores, indices[:, :, joined(places, 0)], rows, share)


def drawn_positions(core: SelectingCoreAttention, length: int, device: torch.device) -> Tensor:
    """Draw the positions of this step's sampled rows, as `sampled_positions`."""
    seed = stateless_seed(core.seed, core.step, core.layer_number, "rows")
    return sampled_positions(length, core.kind.settings.sampled_rows, seed, device)


def scores_of(core: SelectingCoreAttention, rows: Tensor, block_queries: Tensor, features: Tensor) -> Tensor:
    """Score key blocks for query blocks `rows` [r]: [b, h_kv, r, n].

    The rows before each, on which its scores depend, are scored with it.
    """
    scorer, earlier = core.kind.scorer, core.kind.scorer.earlier_rows
    around = (rows[:, None] + torch.arange(-earlier, 1, device=rows.device)).flatten()
    candidates = core.kind.budget.candidates(around[None, None], features.shape[1])
    found = block_scores(scorer, block_queries[:, around.clamp_min(0)], features, candidates, core.weight)
    return found[:, :, earlier :: earlier + 1]


def learn(
    core: SelectingCoreAttention,
    out: Tensor,
    target: Tensor,
    scores: Tensor | None,
    indices: Tensor,
    rows: Tensor,
    share: Tensor,
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
        return (of_rows * share).sum(-1).mean(0).sum() / core.shape.num_query_groups

    core.record("recall", mean((target * listed(indices, num_blocks)).sum(-1)))
    if scores is not None:
        candidates = core.kind.budget.candidates(rows[None, None], num_blocks)
        for name in core.kind.scorer.losses:
            out = core.add_loss(out, name, mean(LOSSES[name](scores, target, candidates)))
    return out
