from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from s2train.attention.hybrid import HybridLayout
from s2train.attention.kind import LayerLayout
from s2train.attention.registry import LETTERS
from s2train.errors import ConfigError
from s2train.layouts.patterns import Dense, Dilated, LocalVertical, MaskPattern, Pattern, Ranges, SlidingWindow
from s2train.pictures import choose_layers, draw_layout
from s2train.pictures.blocks import reduce_masks
from s2train.pictures.grid import draw_grid
from s2train.pictures.style import DENSE, UNSEEN, offset_of
from tests.layouts.layout_cases import make_hybrid, mask_of, patterns, union_of


def picture(hybrid: HybridLayout, folder: Path, seq_length: int = 1024, layers: list[int] | None = None) -> np.ndarray:
    path = folder / "new" / "layout.png"
    draw_layout(hybrid, seq_length, path, layers)
    return imread(path)[..., :3]


@cache
def four_by_four(layers: str) -> np.ndarray:
    """A model of four layers and four heads."""
    with TemporaryDirectory() as folder:
        return picture(make_hybrid(layers, num_layers=4, num_heads=4), Path(folder))


def share(image: np.ndarray, colour: str) -> float:
    return float((np.abs(image - np.array(to_rgb(colour))).max(-1) < 0.01).mean())


@pytest.mark.parametrize(("num_layers", "num_heads"), [(1, 1), (48, 64)])
def test_models_of_any_size_are_drawn(num_layers: int, num_heads: int, tmp_path: Path) -> None:
    image = picture(make_hybrid("S", num_layers=num_layers, num_heads=num_heads), tmp_path)
    assert image.shape[1] == 1650
    assert image.std() > 0.1


def test_heads_of_any_patterns_are_drawn_side_by_side(tmp_path: Path) -> None:
    mask = MaskPattern.of(np.tri(64, dtype=bool), "masks.npz", "layout.pattern")
    heads: tuple[Pattern, ...] = (
        Dense(), mask, Dilated(2, 4, 1), SlidingWindow(3, 1), Ranges(((4, 1), (None, 8)), 3), LocalVertical(2, 4, 1),
    )  # fmt: skip
    hybrid = make_hybrid("S", num_layers=2, num_heads=6)
    mixed = replace(hybrid, layers=(replace(hybrid.layers[0], bound=heads), hybrid.layers[1]))
    assert picture(mixed, tmp_path).std() > 0.1


def test_a_deep_model_has_its_bars_of_offsets_in_few_artists() -> None:
    hybrid = make_hybrid("S", num_layers=200, num_heads=4)
    axes = Figure().subplots()
    draw_grid(axes, hybrid, 1024)
    found = [one for one in axes.collections if isinstance(one, LineCollection)]
    assert len(axes.lines) + len(found) <= 2  # a colour each
    middles = {tuple(segment.mean(0).round(3)) for one in found for segment in one.get_segments()}
    heads = [(row, column, head) for row, layer in enumerate(hybrid.layers) for column, head in enumerate(layer.heads)]
    places = {
        (round(column - 0.4 + 0.8 * (offset_of(head) + 0.5) / head.period, 3), row) for row, column, head in heads
    }
    assert middles == places


def test_dense_layers_take_their_share_of_the_grid() -> None:
    none, quarter, half = (share(four_by_four(layers), DENSE) for layers in ("S", "DSSS", "DS"))
    assert none < 0.001  # but for the blend of letters' edges
    assert half == pytest.approx(2 * quarter, rel=0.1)


def test_a_model_of_dense_layers_alone_is_drawn() -> None:
    assert share(four_by_four("D"), DENSE) > 0.2


def test_blocks_that_no_head_sees_stand_out(tmp_path: Path) -> None:
    partial = picture(make_hybrid("S", num_layers=4, num_heads=4, kind="homogeneous"), tmp_path)
    assert share(four_by_four("S"), UNSEEN) == 0
    assert share(partial, UNSEEN) > 0.01


def test_the_layers_asked_for_are_drawn(tmp_path: Path) -> None:
    hybrid = make_hybrid("DS", num_layers=4, num_heads=4)
    two, none = (picture(hybrid, tmp_path, layers=layers) for layers in ([0, 3], []))
    assert two.shape[0] > none.shape[0]


def test_by_default_the_first_of_each_sparse_sort_is_drawn() -> None:
    rotating = make_hybrid("DSS", num_layers=12, num_heads=2, kind="rotating", stride=6)
    assert choose_layers(rotating, None) == [1, 2, 4]
    assert choose_layers(make_hybrid("DSSS", num_layers=8, num_heads=4), None) == [1]
    assert choose_layers(make_hybrid("D", num_layers=2, num_heads=4), None) == []


def test_a_missing_layer_is_rejected() -> None:
    with pytest.raises(ConfigError, match="no layer 4"):
        choose_layers(make_hybrid("S", num_layers=4, num_heads=4), [1, 4])


@settings(deadline=None)
@given(st.lists(patterns, min_size=1, max_size=3), st.integers(1, 40))
def test_short_masks_are_drawn_block_by_block(heads: list[Pattern], num_blocks: int) -> None:
    reduced = reduce_masks(LayerLayout(LETTERS["S"], tuple(heads), 16), num_blocks)
    causal = np.tri(num_blocks, dtype=bool)
    assert np.array_equal(np.isnan(reduced.union), ~causal)
    assert np.array_equal(reduced.union[causal], union_of(heads, num_blocks).numpy()[causal])
    counts = torch.stack([mask_of(head, num_blocks) for head in heads]).sum(0).numpy()
    assert np.array_equal(reduced.heads[causal], counts[causal])


def test_fine_stripes_become_their_average() -> None:
    layer = make_hybrid("S", num_layers=1, num_heads=3, kind="homogeneous", local=1, stride=16).layers[0]
    reduced = reduce_masks(layer, 2048)
    far = np.tri(len(reduced.union), k=-2, dtype=bool)
    assert np.allclose(reduced.union[far], 1 / 16)
    assert np.allclose(reduced.heads[far], 3 / 16)


def test_squares_at_the_end_count_only_the_blocks_there_are() -> None:
    layer = make_hybrid("D", num_layers=1, num_heads=2).layers[0]
    reduced = reduce_masks(layer, 301)
    causal = np.tri(len(reduced.union), dtype=bool)
    assert np.allclose(reduced.union[causal], 1)
    assert np.allclose(reduced.heads[causal], 2)
