"""Lists of the best key blocks: torch and Triton's kernel against the definition."""

from typing import Any

import pytest
import torch
from s2train.kernels import spec
from s2train.kernels.select_blocks import select_blocks
from torch import Tensor

BACKENDS = ("torch", "triton")
WINDOW, SINKS, SLOTS = 2, 1, 3


def inputs(device: torch.device, rows: int = 23, columns: int = 21, group: int = 4) -> list[Tensor]:
    """Scores of 2 sequences, 2 KV heads and consecutive query blocks up to the one that all columns precede."""
    scores = torch.randn(2, 2, group, rows, columns, device=device) * 3
    number = torch.arange(rows, device=device) + columns + 1 - rows
    counts = (number - WINDOW - SINKS + 1).clamp(0, SLOTS).int()
    return [scores, number[None], counts[None]]


def selected(scores: Tensor, rows: Tensor, counts: Tensor, backend: Any, **options: Any) -> Tensor:
    options = {"window": WINDOW, "sinks": SINKS, "slots": SLOTS, "normalize": True} | options
    return select_blocks(scores, rows, counts, backend=backend, **options)


def block_scores(scores: Tensor, row: int, normalize: bool) -> Tensor:
    """Scores of the candidates of one query block, in float64; `scores` is [group, n_k]."""
    of_heads = scores[:, SINKS : max(SINKS, row - WINDOW + 1)].double()
    return (of_heads.log_softmax(-1) if normalize else of_heads).logsumexp(0)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_best_candidates_are_listed_best_first(
    backend: str, group: int, normalize: bool, device: torch.device
) -> None:
    scores, rows, counts = inputs(device, group=group)
    lists = selected(scores, rows, counts, backend, normalize=normalize)
    assert lists.dtype == torch.int32
    for batch, kv_head, r in torch.cartesian_prod(*(torch.arange(n) for n in lists.shape[:3])).tolist():
        row, count = int(rows[0, r]), int(counts[0, r])
        chosen = lists[batch, kv_head, r, SINKS : SINKS + SLOTS].long()
        expected = block_scores(scores[batch, kv_head, :, r], row, normalize)
        assert (chosen[count:] == -1).all()
        assert len(chosen[:count].unique()) == count
        assert ((chosen[:count] >= SINKS) & (chosen[:count] <= row - WINDOW)).all()
        # blocks whose scores differ by rounding alone may change places
        best = expected.sort(descending=True).values[:count]
        torch.testing.assert_close(expected[chosen[:count] - SINKS], best, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_and_the_window_are_listed_with_the_own_block_last(backend: str, device: torch.device) -> None:
    scores, _, _ = inputs(device, rows=5, columns=9)
    rows = torch.tensor([[0, 1, 4, 8, 9], [-1, -3, 3, 2, 5]], device=device)
    counts = torch.zeros_like(rows, dtype=torch.int32)
    lists = selected(scores, rows, counts, backend, window=3, sinks=2)
    kept = torch.cat([lists[..., :2], lists[..., 5:]], -1)
    assert (lists[..., 2:5] == -1).all()
    for batch, of_rows in enumerate(
        [
            [[-1, -1, -1, -1, 0], [-1, -1, -1, 0, 1], [0, 1, 2, 3, 4], [0, 1, 6, 7, 8], [0, 1, 7, 8, 9]],
            [[-1, -1, -1, -1, -1], [-1, -1, -1, -1, -1], [0, -1, 1, 2, 3], [-1, -1, 0, 1, 2], [0, 1, 3, 4, 5]],
        ]
    ):
        assert kept[batch].tolist() == [of_rows] * 2


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_scores_the_earlier_block_is_listed(backend: str, normalize: bool, device: torch.device) -> None:
    scores, rows, counts = inputs(device)
    twice = scores.repeat_interleave(2, -1)[..., :21]
    lists = selected(twice, rows, counts, backend, normalize=normalize)[..., SINKS : SINKS + 2]
    first, second = lists[:, :, -1].unbind(-1)
    assert ((first == 1) | (second == first + 1)).all()  # block 1 is equal to block 0, which is no candidate


@pytest.mark.parametrize("group", [1, 4])
def test_both_backends_list_the_same_blocks_of_scores_that_differ(group: int, device: torch.device) -> None:
    scores, rows, counts = inputs(device, group=1)
    apart = scores.argsort(-1).argsort(-1).to(torch.float32).expand(-1, -1, group, -1, -1)
    for normalize in (True, False):
        found = [selected(apart, rows, counts, backend, normalize=normalize) for backend in BACKENDS]
        assert torch.equal(*found)


@pytest.mark.parametrize("columns", [1, 2, 3, 16, 17, 33, 2049])
def test_both_backends_list_the_same_blocks_of_ties_at_every_size(
    columns: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few blocks, more slots than blocks, a window or sinks that keep all; outputs start filled."""
    allocate = spec.empty
    monkeypatch.setattr(spec, "empty", lambda *args: allocate(*args).fill_(1 << 30))
    few = min(columns, 20)
    for window, sinks, slots in ((1, 0, 1), (2, 1, few), (1, 2, 20), (few + 2, 0, 2), (1, few, 1)):
        rows = torch.tensor([[-2, 0, 1, columns // 2, columns, columns + window + 1]], device=device)
        candidates = ((rows - window).clamp_max(columns - 1) - sinks + 1).clamp_min(0)
        counts = (torch.rand(candidates.shape, device=device) * (candidates + 1)).long().clamp_max(slots).int()
        of_heads = torch.randint(3, (2, 2, 1, rows.shape[1], columns), device=device).float()
        options = {"window": window, "sinks": sinks, "slots": slots}
        for normalize in (True, False):
            scores = of_heads.expand(-1, -1, 3, -1, -1)
            first, second = (selected(scores, rows, counts, x, normalize=normalize, **options) for x in BACKENDS)
            assert torch.equal(first, second), options


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_far_below_the_best_keep_their_order(backend: str, device: torch.device) -> None:
    scores, rows, counts = inputs(device)
    scores = scores[..., :1] - torch.arange(scores.shape[-1], device=device)
    scores[..., SINKS] += 1000  # probabilities of all others are 0 in float32
    lists = selected(scores, rows, counts, backend)
    assert (lists[:, :, -1, SINKS : SINKS + SLOTS] == torch.arange(SINKS, SINKS + SLOTS, device=device)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_candidate_is_not_read(backend: str, device: torch.device) -> None:
    scores, rows, counts = inputs(device)
    column = torch.arange(scores.shape[-1], device=device)
    later = (column < SINKS) | (column > rows[..., None] - WINDOW)
    lists = selected(scores, rows, counts, backend)
    poisoned = scores.masked_fill(later[:, None, None], torch.nan)
    assert torch.equal(selected(poisoned, rows, counts, backend), lists)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_broken_scores_give_lists_of_candidates(backend: str, normalize: bool, device: torch.device) -> None:
    scores, rows, counts = inputs(device)
    broken = torch.tensor([torch.nan, torch.inf, -torch.inf], device=device)
    scores = torch.where(torch.rand_like(scores) < 0.3, broken[torch.randint(3, scores.shape, device=device)], scores)
    lists = selected(scores, rows, counts, backend, normalize=normalize)
    assert (lists >= -1).all()
    assert (lists <= rows[:, None, :, None]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_sequence_has_its_own_rows_and_counts(backend: str, device: torch.device) -> None:
    scores, rows, counts = inputs(device)
    rows, counts = torch.cat([rows, rows.flip(1)]), torch.cat([counts, counts.flip(1) - 1]).clamp_min(0)
    both = selected(scores, rows, counts, backend)
    for at in (slice(0, 1), slice(1, 2)):
        assert torch.equal(selected(scores[at], rows[at], counts[at], backend), both[at])


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_any_strides_are_read(backend: str, device: torch.device) -> None:
    scores, rows, counts = inputs(device)
    lists = selected(scores, rows, counts, backend)
    wide = torch.full((2, 2, 4, 23, 30), torch.nan, device=device)
    wide[..., 3:24] = scores
    for view in (wide[..., 3:24], scores.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)):
        assert torch.equal(selected(view, rows, counts, backend), lists)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(2, 2, 3, 4)}, "scores must be floating point"),
        ({"rows": torch.zeros(1, 4, dtype=torch.int32)}, "rows must be torch.int64"),
        ({"counts": torch.zeros(3, 5, dtype=torch.int32)}, "counts must be torch.int32"),
        ({"window": 0}, "window must be at least 1"),
        ({"slots": 0}, "slots must be at least 1"),
        ({"scores": torch.zeros(1, 1, 1, 5, 4, dtype=torch.float64), "backend": "triton"}, "takes float32"),
    ],
)
def test_arguments_that_do_not_fit_are_rejected(change: dict[str, Any], message: str, device: torch.device) -> None:
    scores, rows, counts = torch.zeros(1, 1, 1, 5, 4), torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, 5)
    call: dict[str, Any] = {"scores": scores, "rows": rows, "counts": counts.int(), "backend": "torch"} | change
    with pytest.raises(ValueError, match=message):
        selected(**{name: x.to(device) if isinstance(x, Tensor) else x for name, x in call.items()})
