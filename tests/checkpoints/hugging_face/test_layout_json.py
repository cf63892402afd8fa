"""modeling_s2.py keeps the blocks that the layout keeps, by way of JSON."""

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from s2train.kernels.token_mask import token_mask as true_token_mask

from s2train.attention.hybrid import HybridLayout
from s2train.attention.kind import LayerLayout
from s2train.attention.registry import LETTERS
from s2train.checkpoints.hugging_face.layout_json import layout_json, pattern_from_json, pattern_json
from s2train.checkpoints.hugging_face.modeling_s2 import check_layout, keeps, token_mask
from s2train.layouts.patterns import Dense, LocalVertical, Pattern
from s2train.layouts.patterns.dilated import Dilated
from s2train.layouts.patterns.file import MaskPattern
from s2train.layouts.patterns.local_vertical import ReferenceVertical
from s2train.layouts.patterns.ranges import Ranges
from s2train.layouts.patterns.span import Span
from s2train.layouts.patterns.window import GlobalBlocks, SlidingWindow

BLOCKS = 45


def random_mask() -> MaskPattern:
    mask = np.tril(np.random.default_rng().random((BLOCKS, BLOCKS)) < 0.3) | np.eye(BLOCKS, dtype=bool)
    return MaskPattern.of(mask, "some.npz", "layout.pattern")


def any_of(low: int, high: int) -> int:
    return random.randint(low, high)


PATTERNS: dict[str, Any] = {
    "dense": lambda: Dense(),
    "local vertical": lambda: LocalVertical(any_of(1, 9), any_of(1, 12), any_of(0, 20), any_of(0, 3)),
    "reference": lambda: ReferenceVertical(any_of(1, 9), any_of(1, 12), -any_of(0, 20)),
    "ranges": lambda: Ranges(((any_of(2, 6), 1), (any_of(7, 20), 3), (None, any_of(4, 9))), any_of(0, 9), any_of(0, 2)),
    "ranges without a window": lambda: Ranges(((any_of(1, 9), any_of(2, 4)), (None, 7)), any_of(0, 9)),
    "sliding window": lambda: SlidingWindow(any_of(1, 9), any_of(0, 3)),
    "global blocks": lambda: GlobalBlocks(any_of(1, 9), tuple(random.sample(range(BLOCKS), 3))),
    "dilated": lambda: Dilated(any_of(1, 4), any_of(1, 9), any_of(0, 9)),
    "dilated in a window": lambda: Dilated(any_of(1, 4), any_of(1, 9), any_of(0, 9), any_of(4, 30)),
    "span": lambda: Span(any_of(1, 9), random.random() * 0.9, any_of(0, 3)),
    "mask": random_mask,
}


@pytest.mark.parametrize("name", PATTERNS)
def test_keeps_what_the_pattern_keeps(name: str) -> None:
    for _ in range(20):
        pattern: Pattern = PATTERNS[name]()
        query, key = torch.arange(BLOCKS)[:, None], torch.arange(BLOCKS)[None]
        read = json.loads(json.dumps(pattern_json(pattern)))
        assert torch.equal(keeps(read, query, key), pattern.keep(query, key)), pattern


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_comes_back_from_json(name: str) -> None:
    pattern: Pattern = PATTERNS[name]()
    written = json.loads(json.dumps(pattern_json(pattern)))
    assert written == pattern_json(pattern)  # an import compares them
    back = pattern_from_json(written)
    assert pattern_json(back) == pattern_json(pattern)
    query, key = torch.arange(BLOCKS)[:, None], torch.arange(BLOCKS)[None]
    assert torch.equal(back.keep(query, key), pattern.keep(query, key))
    assert name == "mask" or name == "reference" or back == pattern


def test_a_layout_has_each_pattern_once_and_every_head_its_own() -> None:
    heads = (Dense(), LocalVertical(2, 3, 0), LocalVertical(2, 3, 1), Dense())
    layers = (LayerLayout(LETTERS["S"], heads, 32), LayerLayout(LETTERS["D"], (Dense(),) * 4, 32))
    written = layout_json(HybridLayout(layers, 32, 2, None))  # type: ignore[arg-type]
    assert written["block_size"] == 32
    assert len(written["patterns"]) == 3
    assert written["layers"] == [[0, 1, 2, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_passes_the_check_of_the_modelling_file(name: str) -> None:
    for _ in range(20):
        layer = LayerLayout(LETTERS["S"], (PATTERNS[name](), PATTERNS[name]()), 32)
        written = layout_json(HybridLayout((layer,), 32, 1, None))  # type: ignore[arg-type]
        check_layout(json.loads(json.dumps(written)), 1, 2)


def test_token_masks_are_the_kernels() -> None:
    heads = (PATTERNS["local vertical"](), PATTERNS["dilated"](), Dense(), PATTERNS["local vertical"]())
    layer, size, length = LayerLayout(LETTERS["S"], heads, 16), 16, any_of(50, 300)
    written = layout_json(HybridLayout((layer,), size, 1, None))  # type: ignore[arg-type]
    first = any_of(0, length - 1)
    found = token_mask(written["patterns"], written["layers"][0], size, first, length, torch.device("cpu"))
    assert torch.equal(found, true_token_mask(layer.block_layout(length), length, length, causal=True)[:, first:])


def test_a_pattern_that_the_file_does_not_know_is_rejected() -> None:
    class Own(Dense):
        pass

    with pytest.raises(NotImplementedError, match=r"no export of Own yet"):
        pattern_json(Own())
