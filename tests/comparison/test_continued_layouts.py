"""Runs that continue a dense checkpoint: their settings, claims and results; the program is run on a tiny model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from s2train.checkpoints.folders import Progress, find_checkpoint
from s2train.comparison import continued_layouts as continued
from s2train.comparison.continued_layouts import RESULTS, Continuation, Study, continuations, read_results
from s2train.config import PretrainConfig
from s2train.errors import ConfigError
from s2train.needles.results import weights_fingerprint
from s2train.planning import compose_run
from s2train.semsa.frontier_points import Point
from tests.program import metrics, pretrain, run

ROWS = [
    {
        "layout": name,
        "budget": budget,
        "draw": draw,
        "density": budget,
        "file": f"{Point(name, budget, draw).name}.yaml",
    }
    for name, budget, draw in (
        ("dense", 1.0, 0),
        ("squared", 0.25, 0),
        ("random", 0.25, 0),
        ("random", 0.25, 1),
        ("squared", 0.5, 0),
    )
]
SPARSE = """\
layers: S
block_size: 16
allow_partial_coverage: true
pattern: {kind: sliding_window, window: 2}
"""


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A study of a checkpoint at step 10, with its layout files."""
    layouts = tmp_path / "layouts"
    layouts.mkdir()
    for row in ROWS:
        (layouts / row["file"]).write_text("layers: D\n" if row["layout"] == "dense" else SPARSE)
    frontier = {"rows": ROWS, "layouts": str(layouts), "weights": "w", "seq_length": 64}
    return Study(frontier, Path("runs/dense/checkpoints/iter_0000010"), 10, 4, tmp_path / "out")


def names(runs: list[Continuation]) -> list[str]:
    return [found.name for found in runs]


def test_the_runs_are_dense_and_the_layouts_at_the_densities_asked_for(study: Study) -> None:
    assert names(continuations(study, [0.25], ["squared", "random"], draws=1)) == [
        "dense",
        "squared-0.25",
        "random-0.25-0",
    ]
    every = names(continuations(study, None, ["squared", "random"], draws=2))
    assert every == ["dense", "squared-0.25", "random-0.25-0", "random-0.25-1", "squared-0.5"]


@pytest.mark.parametrize("content", ["", "[]", '{"rows": [{}]}'])
def test_results_of_something_else_are_rejected(tmp_path: Path, content: str) -> None:
    (tmp_path / RESULTS).write_text(content)
    with pytest.raises(ConfigError, match=r"^output=.*\.json: holds no results of this program"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("densities", "layouts", "message"),
    [
        ([0.3], ["squared"], "densities=0.3: not in the frontier. It has 0.25, 0.5"),
        ([0.25], ["square"], "layouts=square: unknown"),
    ],
)
def test_what_the_frontier_lacks_is_named(
    study: Study, densities: list[float], layouts: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        continuations(study, densities, layouts, 1)


def test_a_missing_layout_file_is_named(study: Study) -> None:
    (Path(study.frontier["layouts"]) / "squared-0.5.yaml").unlink()
    with pytest.raises(ConfigError, match=r"squared-0\.5\.yaml is missing"):
        continuations(study, None, ["squared"], 1)


def test_random_layouts_need_a_draw(study: Study) -> None:
    assert names(continuations(study, [0.25], ["squared"], 0)) == ["dense", "squared-0.25"]
    with pytest.raises(ConfigError, match=r"^draws=0: too few"):
        continuations(study, [0.25], ["random"], 0)


def trained(*changed: str) -> PretrainConfig:
    return compose_run(["+model=tiny_dense", "train.steps=10", *changed])


@pytest.mark.parametrize(
    ("changed", "decay_steps"),
    [([], 10), (["optim.decay_steps=20"], 20), (["optim.decay_style=constant"], None)],
)
def test_the_dense_runs_learning_rate_schedule_goes_on(
    study: Study, changed: list[str], decay_steps: int | None
) -> None:
    before = trained("train.exit_step=10", *changed)
    after = continued.continued_settings(before, study)
    assert after.optim.decay_steps == decay_steps
    assert after.optim.lr == before.optim.lr
    assert (after.train.steps, after.train.exit_step) == (14, None)
    assert after.checkpoint.resume == str(study.checkpoint)
    assert (after.data, after.model) == (before.data, before.model)
    assert after.seed != before.seed  # not the same batches again
    assert 14 % after.evaluation.interval == 0


def finish(study: Study, run: Continuation, held_out: float, steps: int = 14) -> None:
    folder = continued.run_folder(study, run)
    folder.mkdir(parents=True)
    rates = {"tokens_per_s": 1.0, "model_tflops": 1.0, "memory_gib": 1.0}
    records: list[dict[str, Any]] = [
        {"step": step, "loss": 5.0 - step / 10, "step_time_s": 0.5, "lr": 1e-4, **rates}
        for step in range(11, steps + 1)
    ]
    records[0]["step_time_s"] = 60.0  # compiles
    records[-1]["held_out_loss"] = held_out
    begun = {"event": "config"}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (begun, *records)))


def test_a_finished_run_is_recorded_and_not_due_again(study: Study) -> None:
    dense, squared = continuations(study, [0.25], ["squared"], 1)
    finish(study, dense, 3.0)
    with continued.claimed(study, dense) as is_due:
        assert is_due
        assert continued.is_trained(study, dense)
        row = continued.record(study, dense)
    assert (row["held_out_loss"], row["first_loss"], row["last_loss"]) == (3.0, 3.9, 3.6)
    assert continued.read_results(study.folder)["rows"] == [row]
    with continued.claimed(study, dense) as is_due:
        assert not is_due
    with continued.claimed(study, squared) as is_due:
        assert is_due
        assert not continued.is_trained(study, squared)


def test_a_recorded_step_time_is_without_the_start(study: Study) -> None:
    (dense,) = continuations(study, [0.25], [], 1)
    finish(study, dense, 3.0, steps=study.first + 2)
    assert continued.record(replace(study, steps=2), dense)["step_time_s"] == 0.5


def test_a_run_that_another_process_has_is_not_due(study: Study) -> None:
    dense, squared = continuations(study, [0.25], ["squared"], 1)
    with continued.claimed(study, dense) as first, continued.claimed(study, dense) as second:
        assert (first, second) == (True, False)
        with continued.claimed(study, squared) as other:
            assert other
    with continued.claimed(study, dense) as again:
        assert again


def test_an_interrupted_run_is_not_taken_for_a_finished_one(study: Study) -> None:
    (dense,) = continuations(study, [0.25], [], 1)
    finish(study, dense, 3.0, steps=13)
    assert not continued.is_trained(study, dense)


@pytest.fixture
def readable(study: Study, tmp_path: Path) -> Path:
    """The frontier's file, of a checkpoint that has weights and progress alone."""
    checkpoint = tmp_path / "dense" / "checkpoints" / "iter_0000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "a.distcp").write_bytes(b"weights")
    Progress(10, 40, {}, None).write(checkpoint / "progress.json")
    known = {"checkpoint": str(tmp_path / "dense"), "weights": weights_fingerprint(checkpoint)}
    path = tmp_path / "frontier.json"
    path.write_text(json.dumps(study.frontier | known | {"settings": {}, "finished": True}))
    return path


def test_a_checkpoint_that_was_trained_anew_is_rejected(readable: Path, tmp_path: Path) -> None:
    continued.read_study(readable, tmp_path / "out", 4)
    (tmp_path / "dense" / "checkpoints" / "iter_0000010" / "a.distcp").write_bytes(b"others.")
    with pytest.raises(ConfigError, match=r"^frontier=.*now has others"):
        continued.read_study(readable, tmp_path / "out", 4)


def test_an_output_that_is_no_folder_is_rejected(readable: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match=r"^output=.*out is no folder"):
        continued.read_study(readable, tmp_path / "out", 4)


def test_settings_can_not_change_before_the_first_run_has_ended(
    readable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continued, "read_config", lambda checkpoint: trained())
    continued.begin(continued.read_study(readable, tmp_path / "out", 4, ["optim.lr=1e-4"]))
    with pytest.raises(ConfigError, match=r"^output=.*holds runs with another settings"):
        continued.read_study(readable, tmp_path / "out", 4, ["optim.lr=1e-3"])


def test_results_of_layouts_that_were_chosen_anew_are_rejected(
    readable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continued, "read_config", lambda checkpoint: trained())
    study = continued.read_study(readable, tmp_path / "out", 4)
    continued.begin(study)
    content = json.loads(study.results.read_text())
    study.results.write_text(json.dumps(content | {"rows": [{"file": "squared-0.25.yaml", "density": 0.2}]}))
    with pytest.raises(ConfigError, match=r"^output=.*results of another squared-0.25.yaml: density 0.2000, not 0.25"):
        continued.read_study(readable, tmp_path / "out", 4)


@pytest.mark.slow
def test_the_program_trains_each_layout_from_the_checkpoint_once(study: Study, tmp_path: Path) -> None:
    pretrain(tmp_path / "dense", "layout=dense", "layout.block_size=16", "train.steps=3", cwd=tmp_path).succeeded()
    weights = weights_fingerprint(find_checkpoint(tmp_path / "dense"))
    content = study.frontier | {"checkpoint": str(tmp_path / "dense"), "settings": {}, "finished": True}
    content["weights"] = weights
    (tmp_path / "frontier.json").write_text(json.dumps(content))
    words = ["frontier.json", "out, a=1", "--densities", "0.25", "--layouts", "squared", "--steps", "2"]
    words += ["evaluation.batches=1", "--minutes", "3"]
    run("continue_layouts.py", *words, processes=0, cwd=tmp_path).succeeded()
    results = json.loads((tmp_path / "out, a=1" / "continued.json").read_text())
    assert [row["file"] for row in results["rows"]] == ["dense.yaml", "squared-0.25.yaml"]
    dense, sparse = results["rows"]
    assert dense["losses"] != sparse["losses"]
    last_lr = metrics(tmp_path / "dense")[-1]["lr"]
    assert dense["lr"] == sparse["lr"] <= last_lr
    again = run("continue_layouts.py", *words, processes=0, cwd=tmp_path).succeeded()
    assert "pretrain.py" not in again.out
    assert json.loads((tmp_path / "out, a=1" / "continued.json").read_text()) == results
    longer = run("continue_layouts.py", *words[:-4], "3", *words[-3:], processes=0, cwd=tmp_path)
    assert "holds runs with another steps" in longer.err
