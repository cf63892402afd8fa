"""Which pages a sequence still needs, against the patterns' definition."""

import json
import random

import numpy as np
import pytest
import torch

from s2train.checkpoints.hugging_face.layout_json import layout_json
from s2train.layouts.patterns import Dense, LocalVertical, Pattern
from s2train.layouts.patterns.dilated import Dilated
from s2train.layouts.patterns.file import MaskPattern
from s2train.layouts.patterns.ranges import Ranges
from s2train.layouts.patterns.span import Span
from s2train.layouts.patterns.window import GlobalBlocks, SlidingWindow
from s2train.serving.export_layout import ExportLayout
from s2train.serving.freeing import Expiry, held_pages, last_uses, longest_hit, most_pages, slots_of
from tests.inference.cached_models import layers_of

BLOCKS = 23


def random_mask() -> MaskPattern:
    mask = np.tril(np.random.default_rng().random((BLOCKS, BLOCKS)) < 0.3) | np.eye(BLOCKS, dtype=bool)
    return MaskPattern.of(mask, "some.npz", "layout.pattern")


def any_heads(count: int) -> list[Pattern]:
    made = [
        lambda: Dense(),
        lambda: LocalVertical(random.randint(1, 4), random.randint(1, 6), random.randint(0, 5), random.randint(0, 2)),
        lambda: SlidingWindow(random.randint(1, 6), random.randint(0, 2)),
        lambda: GlobalBlocks(random.randint(1, 4), tuple(random.sample(range(BLOCKS), 3))),
        lambda: Dilated(random.randint(1, 3), random.randint(1, 5), random.randint(0, 4)),
        lambda: Ranges(((2, 1), (random.randint(3, 8), 2), (None, random.randint(3, 7))), random.randint(0, 6)),
        lambda: Span(random.randint(1, 4), random.random() * 0.9, random.randint(0, 2)),
        random_mask,
    ]
    return [random.choice(made)() for _ in range(count)]


def brute_force(heads: list[Pattern], num_kv_heads: int, shared: int, tp: int) -> np.ndarray:
    """Whether a query block reads a page: bool [queries, blocks, slots], by any rank's heads of the slot."""
    query, key = torch.arange(BLOCKS)[:, None], torch.arange(BLOCKS)[None]
    kept = torch.stack([head.keep(query, key) & (query >= key) for head in heads])
    by_kv_head = kept.view(tp, num_kv_heads // shared, shared, -1, BLOCKS, BLOCKS).any(3).any(2).any(0)
    return by_kv_head.permute(1, 2, 0).numpy()


def case() -> tuple[np.ndarray, np.ndarray]:
    """What is read, and the last uses."""
    tp, num_kv_heads, group = random.choice([1, 2]), random.choice([1, 2, 4]), random.choice([1, 2, 3])
    shared = random.choice([n for n in (1, 2) if num_kv_heads % n == 0])
    heads = any_heads(tp * num_kv_heads * group)
    uses = last_uses(slots_of(heads, num_kv_heads, shared, tp), BLOCKS)
    return brute_force(heads, num_kv_heads, shared, tp), uses


@pytest.mark.parametrize("_", range(10))
def test_what_is_needed_depends_on_no_default_of_a_loader(_: int) -> None:
    """vLLM builds a model with a GPU as the default device, and its dtype as the default."""
    heads, num_blocks = any_heads(8), random.randint(5, BLOCKS)
    layout = json.loads(json.dumps(layout_json(layers_of(heads, block_size=32, num_kv_heads=4))))

    def found() -> np.ndarray:
        last_uses.cache_clear()
        read = ExportLayout.read({"layout": layout, "num_attention_heads": 8, "num_key_value_heads": 4}, "export")
        return last_uses(slots_of(read.layers[0], 4, 1, 1), num_blocks)

    expected, dtype = found(), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):  # from which the host can read nothing
            loaded = found()
    finally:
        torch.set_default_dtype(dtype)
    assert np.array_equal(loaded, expected)


@pytest.mark.parametrize("_", range(10))
def test_a_page_is_needed_up_to_its_last_query(_: int) -> None:
    read, uses = case()
    for query in range(BLOCKS):
        needed = read[query:].any(0)[: query + 1]
        assert np.array_equal(uses[: query + 1] >= query, needed)


@pytest.mark.parametrize("_", range(10))
def test_held_pages_are_counted(_: int) -> None:
    _, uses = case()
    held = [int((uses[:before] >= before).sum()) for before in range(BLOCKS + 1)]
    assert held_pages(uses).tolist() == held
    new = random.randint(1, BLOCKS)
    peak = max(held[first] + uses[first : first + new + 1].size for first in range(BLOCKS))
    assert most_pages(uses, new * 16, 16) == peak


@pytest.mark.parametrize("_", range(20))
def test_a_hit_has_every_page_that_later_queries_read(_: int) -> None:
    _, uses = case()
    most, step = random.randint(0, BLOCKS), random.choice([1, 2, 3])
    missing = np.random.default_rng().random((most, uses.shape[1])) < random.choice([0, 0.02, 0.1, 1])
    fits = [n for n in range(0, most + 1, step) if not (missing[:n] & (uses[:n] >= n)).any()]
    assert longest_hit(uses, missing, step) == fits[-1]


def test_entries_expire_once_each_after_their_last_use() -> None:
    _, uses = case()
    expiry, bounds = Expiry(uses), sorted(random.sample(range(1, BLOCKS), 4))
    expired = set()
    for first, stop in zip([0, *bounds], [*bounds, BLOCKS], strict=True):
        entries = set(expiry.between(first, stop).tolist())
        assert entries == set(np.flatnonzero((uses.ravel() >= first) & (uses.ravel() < stop)).tolist())
        assert not entries & expired
        expired |= entries
    assert len(expired) == uses.size
