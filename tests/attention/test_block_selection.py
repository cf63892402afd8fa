"""Lists of selected key blocks, as pure functions of queries and keys; the core attention is in its own test."""

from dataclasses import dataclass

import pytest
import torch
from s2train.kernels.attention import block_sparse_attention
from s2train.kernels.layout import BlockLayout
from s2train.kernels.topk_layout import TopKLayout
from torch import Tensor

from s2train.attention.block_selection import QUERIES, SCORERS, BlockSelectionKind, BlockSelectionSettings
from s2train.attention.selection.lists import Budget, listed, select
from s2train.attention.selection.mixing import mix, running_means
from s2train.attention.selection.scorer import Scorer, block_scores
from s2train.attention.selection.targets import (
    kl_divergence,
    row_mass,
    sampled_positions,
    squared_error,
)
from s2train.attention.weights import AttentionShape, Weight

BLOCK, BLOCKS = 16, 9
LENGTH = BLOCK * BLOCKS - 5  # the last block is partial
SHAPE = AttentionShape(hidden_size=32, num_heads=4, num_query_groups=2, head_dim=8)


@dataclass
class Layer:
    """A scorer with random weights, as a layer uses it."""

    scorer: Scorer
    budget: Budget
    queries: str
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, dtype: torch.dtype = torch.float64, **settings: object) -> "Layer":
        kind = BlockSelectionKind("B", BlockSelectionSettings(**settings), "layout.kinds.B")  # type: ignore[arg-type]
        kind.check_settings()
        weights = {weight.name: _random(weight).to(dtype) for weight in kind.weights(SHAPE)}
        return cls(kind.scorer, kind.budget, kind.settings.queries, weights)

    def lists(self, query: Tensor, key: Tensor) -> Tensor:
        """Lists of [s, b, h, d], by definition: no batching, nothing shared with the core attention."""
        count = -(-len(query) // BLOCK)
        rows = torch.arange(count)[None, None]
        if self.queries == "first_token":
            block_queries = query[::BLOCK]
        else:
            means = [query[i * BLOCK : (i + 1) * BLOCK].mean(0) for i in range(count - 1)]
            block_queries = torch.stack([torch.zeros_like(means[0]), *means])
        whole = len(key) // BLOCK
        blocks = key[: whole * BLOCK].unflatten(0, (whole, BLOCK)).permute(2, 0, 1, 3, 4)
        features = self.scorer.pool_keys(blocks, self.weights.__getitem__)
        features = torch.nn.functional.pad(features, (0, 0, 0, 0, 0, count - whole))
        candidates = self.budget.candidates(rows, count)
        scores = block_scores(
            self.scorer, block_queries.transpose(0, 1), features, candidates, self.weights.__getitem__
        )
        return select(scores[:, :, None], rows, self.budget, self.budget.most_chosen(count))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        layout = TopKLayout.from_indices(self.lists(query, key), BLOCK, num_heads=SHAPE.num_heads)
        return block_sparse_attention(query, key, value, layout)


def _random(weight: Weight) -> Tensor:
    return torch.randn(weight.shape, dtype=torch.float64) * 0.5


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    heads = (SHAPE.num_heads, SHAPE.num_query_groups, SHAPE.num_query_groups)
    return [torch.randn(LENGTH, 2, count, SHAPE.head_dim, dtype=dtype) for count in heads]


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("scorer", SCORERS)
def test_no_position_of_a_block_changes_an_earlier_output(scorer: str, queries: str) -> None:
    layer = Layer.of(torch.float32, scorer=scorer, queries=queries, top_k=1)
    before = inputs(torch.float32)
    out = layer.attend(*before)
    first = int(torch.randint(3, BLOCKS - 1, ())) * BLOCK
    for position in range(first, first + BLOCK):
        later = [torch.cat([x[:position], torch.randn_like(x[position:]) * 3]) for x in before]
        assert torch.equal(layer.attend(*later)[:position], out[:position])


def test_a_score_from_the_blocks_own_mean_would_be_caught() -> None:
    layer = Layer.of(torch.float32, scorer="moba", queries="first_token", top_k=1)
    query, key, _ = inputs(torch.float32)
    means = torch.nn.functional.pad(query, (0, 0, 0, 0, 0, 0, 0, 5)).unflatten(0, (BLOCKS, BLOCK)).mean(1)
    leaky = query.clone()
    leaky[::BLOCK] = means  # now the first token speaks for its whole block
    first, caught = 6 * BLOCK, 0
    for position in range(first + 1, first + BLOCK):
        later = query.clone()
        later[position:] = torch.randn_like(later[position:]) * 3
        own = torch.nn.functional.pad(later, (0, 0, 0, 0, 0, 0, 0, 5)).unflatten(0, (BLOCKS, BLOCK)).mean(1)
        later[::BLOCK] = own
        caught += not torch.equal(layer.lists(leaky, key)[:, :, 6], layer.lists(later, key)[:, :, 6])
    assert caught > 0


@pytest.mark.parametrize("scorer", SCORERS)
def test_all_blocks_selected_is_dense_attention(scorer: str) -> None:
    query, key, value = inputs()
    whole = BlockLayout.from_mask(torch.ones(4, BLOCKS, BLOCKS, dtype=torch.bool).tril(), BLOCK)
    dense = block_sparse_attention(query, key, value, whole)
    for budget in ({"top_k": BLOCKS - 3}, {"share": 1.0}):
        torch.testing.assert_close(Layer.of(scorer=scorer, **budget).attend(query, key, value), dense)


@pytest.mark.parametrize("budget", [Budget(2, 1, 2, None), Budget(3, 0, None, 0.4), Budget(2, 2, None, 0.01)])
def test_each_query_block_reads_what_the_plan_counts(budget: Budget) -> None:
    rows = torch.arange(BLOCKS)[None, None]
    lists = select(torch.randn(2, 2, 1, BLOCKS, BLOCKS), rows, budget, budget.most_chosen(BLOCKS))
    marks = listed(lists, BLOCKS)
    assert (marks.sum(-1) == torch.tensor([budget.num_kept(row) for row in range(BLOCKS)])).all()
    assert not marks.triu(1).any()
    for row in range(BLOCKS):
        assert marks[:, :, row, max(0, row - budget.window + 1) : row + 1].all()
        assert marks[:, :, row, : min(budget.sinks, row + 1)].all()
    assert (lists[..., -1] == torch.arange(BLOCKS)).all()


def test_the_best_candidates_are_selected_and_ties_go_to_the_earlier_block() -> None:
    budget = Budget(2, 1, 2, None)
    scores = torch.tensor([9.0, 1.0, 3.0, 2.0, 3.0, 3.0, 8.0, 8.0, 8.0]).expand(1, 1, 1, BLOCKS, BLOCKS)
    lists = select(scores, torch.arange(BLOCKS)[None, None], budget, 2)
    assert sorted(set(lists[0, 0, 7].tolist())) == [0, 2, 4, 6, 7]
    assert sorted(set(lists[0, 0, 2].tolist()) - {-1}) == [0, 1, 2]


def test_a_head_of_large_scores_has_no_more_say_for_moba_than_another() -> None:
    features = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])[None, :, None]
    queries = torch.tensor([[30.0, 1.0, 0.0], [0.0, 0.0, 3.0]])[None, None] * 3**0.5
    candidates = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    scorer = Layer.of(scorer="moba", top_k=1).scorer
    # shares of block 0: 0.48 and 0.04, of block 2: 0.17 and 0.87
    assert int(block_scores(scorer, queries, features, candidates, {}.__getitem__).argmax()) == 2


@pytest.mark.parametrize("scorer", SCORERS)
def test_rows_without_a_past_give_finite_gradients(scorer: str) -> None:
    layer = Layer.of(scorer=scorer, top_k=1)
    weights = {name: value.requires_grad_() for name, value in layer.weights.items()}
    candidates = layer.budget.candidates(torch.arange(3)[None, None], 3)
    features = layer.scorer.pool_keys(torch.randn(1, 3, BLOCK, 2, 8, dtype=torch.float64), weights.__getitem__)
    block_queries = torch.randn(1, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    scores = block_scores(layer.scorer, block_queries, features, candidates, weights.__getitem__)
    target = torch.rand(1, 2, 3, 3, dtype=torch.float64)
    (kl_divergence(scores, target, candidates).sum() + squared_error(scores, target, candidates).sum()).backward()
    assert block_queries.grad is not None
    assert all(bool(x.grad.isfinite().all()) for x in (block_queries, *weights.values()) if x.grad is not None)


def test_the_probability_of_sampled_queries_is_that_of_dense_attention() -> None:
    query, key, _ = inputs()
    at = sampled_positions(LENGTH, 20, int(torch.randint(1 << 30, ())), torch.device("cpu"))
    assert (at.diff() >= 0).all()
    mass = row_mass(query[at], key, at, BLOCK, 0.3)
    assert mass.sum(-1) == pytest.approx(torch.ones(2, 2, 20, dtype=torch.float64))
    row, position = 7, int(at[7])
    scores = query[position, 1, 2:] @ key[: position + 1, 1, 1].T * 0.3
    probability = torch.nn.functional.pad(scores.softmax(-1).mean(0), (0, BLOCKS * BLOCK - position - 1))
    torch.testing.assert_close(mass[1, 1, row], probability.unflatten(0, (BLOCKS, BLOCK)).sum(-1))


def test_one_query_of_each_part_of_the_sequence_is_sampled() -> None:
    at = sampled_positions(1000, 10, 1, torch.device("cpu"))
    assert (at // 100).tolist() == list(range(10))
    assert sampled_positions(5, 10, 1, torch.device("cpu")).tolist() == [0, 1, 2, 3, 4]


def test_losses_are_zero_at_the_target_and_ignore_rows_without_mass() -> None:
    candidates = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    target = torch.tensor([0.1, 0.2, 0.05, 0.3], dtype=torch.float64).expand(1, 1, 1, 4)
    assert float(kl_divergence(target.log() + 3, target, candidates)) == pytest.approx(0, abs=1e-12)
    assert float(squared_error(target.log() - 1, target, candidates)) == pytest.approx(0, abs=1e-12)
    assert float(kl_divergence(torch.randn(1, 1, 1, 4).double(), target, candidates)) > 0
    assert float(kl_divergence(torch.randn(1, 1, 1, 4).double(), target * 0, candidates)) == 0


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, LENGTH])
def test_running_means_are_those_of_all_values_so_far(length: int) -> None:
    value = torch.randn(length, 2, 2, 8, dtype=torch.float64, requires_grad=True)
    means = running_means(value, BLOCK)
    expected = torch.stack([value[: t + 1].mean(0) for t in range(length)])
    torch.testing.assert_close(means, expected)
    upstream = torch.randn_like(means)
    (found,), (wanted,) = (torch.autograd.grad(x, value, upstream) for x in (means, expected))
    torch.testing.assert_close(found, wanted)


def test_running_means_of_bfloat16_are_summed_in_float32() -> None:
    value = torch.ones(1000, 1, 1, 1, dtype=torch.bfloat16)  # bfloat16 counts to 256
    assert torch.equal(running_means(value, BLOCK), torch.ones(1000, 1, 1, 1))


def test_an_open_gate_gives_attention_and_a_closed_one_the_mean() -> None:
    query, _, value = inputs()
    out, means = torch.randn_like(query), running_means(value, BLOCK)
    for bias, expected in ((100.0, out), (-100.0, means.repeat_interleave(2, 2))):
        gate = {"gate_query": torch.zeros(4, 8).double(), "gate_bias": torch.full((4,), bias).double()}
        torch.testing.assert_close(mix(out, query, means, gate.__getitem__), expected)
