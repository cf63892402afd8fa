"""The points of a frontier: their layout files, what is measured again, and which data are held out."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from s2train.config import DataConfig, PretrainConfig
from s2train.data.tokenizers import load_tokenizer
from s2train.errors import ConfigError
from s2train.files import write_json
from s2train.layouts.patterns import Dense, GlobalBlocks, LocalVertical, Pattern, SlidingWindow, Span
from s2train.planning import compose_run, hybrid_layout
from s2train.semsa import frontier
from s2train.semsa.baselines import Layers
from s2train.semsa.calibration import Subject, with_data
from s2train.semsa.config import CalibrationDataConfig, FrontierConfig
from s2train.semsa.frontier_pictures import read_layers
from s2train.semsa.frontier_points import Point, every_point, find_layers, without_layout
from s2train.semsa.layouts import layout_of, settings_of, write_layout
from s2train.semsa.profile import Profile
from s2train.semsa.rules import pattern_of
from tests.semsa.toy import profile_of

PATTERNS = (
    Dense(),
    Span(2, 0.25, 1),
    SlidingWindow(3, 1),
    LocalVertical(2, 4, 3, 1),
    GlobalBlocks(2, (0, 5)),
)
TOY = ["+model=tiny_dense", "model.num_layers=1", "model.hidden_size=128", "model.num_query_groups=2"]


@pytest.fixture(scope="module")
def profile() -> Profile:
    found = profile_of([20, 20, 160, 20])
    return replace(found, about={**found.about, "precision": "fp32"})


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: type(pattern).__name__)
def test_the_settings_of_a_pattern_make_the_same_pattern(pattern: Pattern) -> None:
    assert pattern_of(settings_of(pattern)) == pattern


def measured_points(profile: Profile) -> dict[str, Layers]:
    cfg = settings(densities=[0.45, 0.6], whole_groups=False)
    return {point.name: layers for point, layers in find_layers(every_point(cfg), cfg, profile)}


def test_a_training_run_takes_each_points_file_as_its_layout(profile: Profile, tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="the extra semsa is not installed")
    found = measured_points(profile)
    assert {"dense", "squared-0.45", "mass-0.6", "random-0.45-1", "window-0.6", "stripes-0.6"} <= found.keys()
    of_one_density = {name: layers for name, layers in found.items() if "0.45" not in name}
    for name, layers in of_one_density.items():
        write_layout(tmp_path / f"{name}.yaml", layout_of(layers, profile), [name])
        run = compose_run([*TOY, f"layout=file:{tmp_path / name}.yaml"])
        assert [list(layer.heads) for layer in hybrid_layout(run).layers] == layers
        if name != "dense":
            assert read_layers(tmp_path / f"{name}.yaml") == (layers, profile.block_size)


def test_random_layouts_differ_by_draw_and_not_by_what_else_is_measured(profile: Profile) -> None:
    pytest.importorskip("scipy", reason="the extra semsa is not installed")
    every, cfg = measured_points(profile), settings(whole_groups=False)
    assert every["random-0.6-0"] != every["random-0.6-1"]
    ((_, alone),) = find_layers([Point("random", 0.6, 1)], cfg, profile)
    assert alone == every["random-0.6-1"]


def test_densities_that_no_layout_meets_are_named(profile: Profile) -> None:
    pytest.importorskip("scipy", reason="the extra semsa is not installed")
    asked = every_point(settings(densities=[0.01, 0.45], whole_groups=False))
    found = [point for point, _ in find_layers(asked, settings(whole_groups=False), profile)]
    assert without_layout(asked, found)[0] == "density 0.01 is not measured: no such layout meets it"
    kept = [point for point in asked if point.budget != 0.01 and point.layout != "stripes"]
    assert without_layout(asked, kept)[1] == "density 0.45 is not measured for S2 stripes: no such layout meets it"
    assert not without_layout(kept, kept)


def settings(**changed: Any) -> FrontierConfig:
    own = {"checkpoint": "runs/toy", "profile": "p.npz", "output": "f.json", "draws": 2, "densities": [0.45]}
    return FrontierConfig(**own | changed)


def started(profile: Profile, tmp_path: Path, **changed: Any) -> dict[str, Any]:
    """What the program begins with in `tmp_path`."""
    cfg = settings(output=str(tmp_path / "f.json"), layouts=str(tmp_path / "layouts"), **changed)
    run = compose_run(TOY)
    return frontier.begun_content(cfg, profile, Subject(Path("runs/toy"), run, run, load_tokenizer("bytes")))


def row(name: str, folder: Path | None = None) -> dict[str, Any]:
    """A measured row, with its file if `folder` is given."""
    if folder is not None:
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.yaml").write_text("layers: D\n")
    return {"layout": name, "budget": 0.45, "draw": 0, "loss": 1.0, "file": f"{name}.yaml"}


def saved(profile: Profile, tmp_path: Path, *rows: dict[str, Any], finished: bool = False) -> None:
    content = started(profile, tmp_path / "elsewhere")
    write_json(tmp_path / "f.json", content | {"rows": list(rows), "finished": finished})


def test_a_second_start_keeps_what_is_measured_even_at_further_densities(profile: Profile, tmp_path: Path) -> None:
    rows = [row(name, tmp_path / "layouts") for name in ("dense", "window")]
    saved(profile, tmp_path, *rows)
    assert started(profile, tmp_path)["rows"] == rows
    assert started(profile, tmp_path, densities=[0.2, 0.45], draws=3)["rows"] == rows
    assert started(profile, tmp_path, overwrite=True)["rows"] == rows  # as after preemption


def test_a_row_without_its_layout_file_is_measured_again(profile: Profile, tmp_path: Path) -> None:
    dense = row("dense", tmp_path / "layouts")
    saved(profile, tmp_path, dense, row("window"))
    assert started(profile, tmp_path)["rows"] == [dense]


def test_another_profile_or_other_samples_are_not_mixed_with_what_is_there(profile: Profile, tmp_path: Path) -> None:
    saved(profile, tmp_path, row("dense", tmp_path / "layouts"))
    other = replace(profile, about={**profile.about, "samples": 7})
    for changed, message in (
        ({"samples": 3}, "measured with another samples"),
        ({"whole_groups": False}, "measured with another whole_groups"),
    ):
        with pytest.raises(ConfigError, match=message):
            started(profile, tmp_path, **changed)
        assert started(profile, tmp_path, overwrite=True, **changed)["rows"] == []
    with pytest.raises(ConfigError, match="measured with another profile"):
        started(other, tmp_path)


def test_overwriting_a_finished_frontier_measures_it_again(profile: Profile, tmp_path: Path) -> None:
    dense = row("dense", tmp_path / "layouts")
    saved(profile, tmp_path, dense, finished=True)
    assert started(profile, tmp_path)["rows"] == [dense]
    assert started(profile, tmp_path, overwrite=True)["rows"] == []


def test_layouts_of_another_frontier_are_not_replaced(profile: Profile, tmp_path: Path) -> None:
    row("dense", tmp_path / "layouts")
    with pytest.raises(ConfigError, match=r"layouts=.*: holds dense.yaml"):
        started(profile, tmp_path)
    assert started(profile, tmp_path, overwrite=True)["rows"] == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("a", "b")),
        ({"valid_path": "c"}, ("a", "c")),
        ({"path": "d"}, ("d", None)),
        ({"path": "d", "valid_path": "c"}, ("d", "c")),
    ],
)
def test_held_out_data_are_the_runs_unless_data_are_named(
    given: dict[str, str], expected: tuple[str, str | None]
) -> None:
    run = compose_run(TOY)
    trained: PretrainConfig = replace(run, data=DataConfig(path="a", valid_path="b"))
    found = with_data(trained, CalibrationDataConfig(**given), 128, True, 1).data
    assert (found.path, found.valid_path) == expected
    assert asdict(found)["cache"] == CalibrationDataConfig().cache
