from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from s2train.layouts.hybrid import HybridLayout
from s2train.layouts.pictures import DENSE_COLOUR, UNSEEN_COLOUR, draw_layer_head_grid
from tests.layouts.layout_cases import make_hybrid


def picture(hybrid: HybridLayout, folder: Path, seq_length: int = 1024) -> np.ndarray:
    path = folder / "new" / "layout.png"
    draw_layer_head_grid(hybrid, seq_length, path)
    return imread(path)[..., :3]


def share(image: np.ndarray, colour: str) -> float:
    return float((np.abs(image - np.array(to_rgb(colour))).max(-1) < 0.01).mean())


@pytest.mark.parametrize(("num_layers", "num_heads"), [(1, 1), (4, 4), (32, 32), (48, 64)])
def test_models_of_any_size_are_drawn(num_layers: int, num_heads: int, tmp_path: Path) -> None:
    image = picture(make_hybrid("S", num_layers=num_layers, num_heads=num_heads), tmp_path)
    assert image.shape == (810, 1650, 3)
    assert image.std() > 0.1


def test_dense_layers_take_their_share_of_the_grid(tmp_path: Path) -> None:
    none, quarter, half = (
        share(picture(make_hybrid(layers, num_layers=4, num_heads=4), tmp_path), DENSE_COLOUR)
        for layers in ("S", "DSSS", "DS")
    )
    assert none == 0
    assert half == pytest.approx(2 * quarter, rel=0.1)


def test_a_model_of_dense_layers_alone_is_drawn(tmp_path: Path) -> None:
    image = picture(make_hybrid("D", num_layers=4, num_heads=4), tmp_path)
    assert share(image, DENSE_COLOUR) > 0.3


def test_blocks_that_no_head_sees_stand_out(tmp_path: Path) -> None:
    covered, partial = (
        picture(make_hybrid("S", num_layers=2, num_heads=4, kind=kind), tmp_path) for kind in ("shifted", "homogeneous")
    )
    assert share(covered, UNSEEN_COLOUR) == 0
    assert share(partial, UNSEEN_COLOUR) > 0.01
