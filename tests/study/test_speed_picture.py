import itertools
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from s2train.study import speed
from s2train.study.comparison import Group, groups
from s2train.study.files import Folders
from s2train.study.picture import variant_colours
from s2train.study.results import read_results
from s2train.study.speed_picture import draw_phase
from s2train.study.variants import VARIANTS, Run
from tests.study.small_results import measured, result


@pytest.fixture
def phase(tmp_path: Path) -> list[Group]:
    """Two seeds of every variant, close together in loss and in speed."""
    folders, random = Folders(tmp_path, Path("launch")), np.random.default_rng()
    for variant, seed in itertools.product(VARIANTS, (1, 2)):
        result(folders, Run(variant, seed=seed), [4.0, 2 + 0.05 * random.random()], 1.0, shared_gpu=True)
    measured(folders, **{variant: 300_000 + 20_000 * random.random() for variant in VARIANTS})
    [own] = groups(read_results(folders), speed.read(folders)).values()
    return own


@pytest.fixture
def figure(phase: list[Group]) -> Figure:
    figure = Figure(figsize=(6.5, 4.5), dpi=150)
    renderer = FigureCanvasAgg(figure).get_renderer()
    draw_phase(figure.add_axes((0.13, 0.13, 0.84, 0.8)), phase, variant_colours({"16k": phase}), renderer)
    figure.draw_without_rendering()
    return figure


def test_labels_of_close_points_do_not_overlap(figure: Figure, phase: list[Group]) -> None:
    [axes] = figure.axes
    boxes = [Text.get_window_extent(label) for label in axes.texts]
    assert [label.get_text() for label in axes.texts] == [group.variant for group in phase]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    for group in phase:
        ends = axes.transData.transform([(group.tokens_per_s, loss) for loss in group.losses])
        assert not any(box.contains(x, y) for box in boxes for x, y in ends)


def test_bars_span_the_seeds_and_a_line_marks_dense(figure: Figure, phase: list[Group]) -> None:
    [axes] = figure.axes
    for group, container in zip(phase, axes.containers, strict=True):
        _, caps, _ = container.lines
        assert sorted(cap.get_ydata()[0] for cap in caps) == pytest.approx(sorted(group.losses))
    [level] = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    assert level == pytest.approx(np.mean(phase[0].losses))
