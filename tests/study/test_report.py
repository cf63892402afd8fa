import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from s2train.errors import ConfigError
from s2train.study import speed
from s2train.study.comparison import common_gpu_seconds, groups
from s2train.study.files import Folders
from s2train.study.recall import Recall, recall_curve
from s2train.study.report import write_report
from s2train.study.results import read_results, save_result
from s2train.study.settings import Recipe, train_settings
from s2train.study.variants import Run
from tests.study.small_results import cells, measured, result, summary

NAME = "block_selection"


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path, Path("launch"))


def probes(correct: int, trials: int, second: float, count: int) -> dict[str, Any]:
    score = {"correct": correct, "trials": trials}
    return {
        "completion": [{"length": 1024, "with_definition": score, "without_definition": score | {"correct": 1}}],
        "recurrence": {"by_distance": [{"from": 64, "count": count, "second_loss": second, "first_loss": 6.0}]},
    }


def test_losses_are_compared_at_the_gpu_time_of_the_fastest_run(folders: Folders) -> None:
    result(folders, Run("dense"), [4.0, 2.0], step_s=2.0)
    result(folders, Run("hybrid"), [5.0, 3.0], step_s=1.5)
    dense, hybrid = groups(read_results(folders))["16k"]
    seconds = common_gpu_seconds([dense, hybrid])
    assert seconds == 30
    assert hybrid.losses_at(seconds) == [3.0]
    assert dense.losses_at(seconds) == [3.0]  # halfway between 20 and 40 seconds


def test_probes_of_seeds_are_counted_together(folders: Folders) -> None:
    for run, own in ((Run("dense", seed=1), (3, 10, 1.0, 1)), (Run("dense", seed=2), (5, 10, 3.0, 3))):
        result(folders, run, [4.0, 2.0], 1.0)
        folders.probes(run).write_text(json.dumps(probes(*own)))
    [[group]] = groups(read_results(folders)).values()
    share, (low, high), without = group.completions()[1024]
    assert (share, without) == (0.4, 0.1)
    assert low < 0.4 < high
    assert group.recurrences() == {64: (4, 2.5, 6.0)}


def test_losses_and_probes_of_different_texts_are_said_not_to_be_comparable(folders: Folders) -> None:
    for variant, tokens, text in (("dense", 1024, "a"), ("hybrid", 2048, "b")):
        run = Run(variant)
        result(folders, run, [4.0, 2.0], 1.0, summary=asdict(summary(100.0)) | {"held_out_tokens": tokens})
        folders.probes(run).write_text(json.dumps(probes(3, 10, 1.0, 1) | {"text": {"sha256": text}}))
    write_report(folders)
    report = (folders.root / "quality.md").read_text()
    assert "Held-out losses are over different numbers of tokens (1,024, 2,048), and not comparable." in report
    assert "Probes are of several texts or tokenizers, and not comparable." in report
    folders.result(Run("hybrid")).unlink()
    folders.probes(Run("hybrid")).unlink()
    write_report(folders)
    assert "not comparable" not in (folders.root / "quality.md").read_text()


@pytest.mark.parametrize(
    ("change", "name"),
    [({"seed": 7}, "seed"), ({"recurrence": {"by_distance": [], "sequences": 8}}, "sequences"), ({}, None)],
)
def test_probes_of_other_settings_are_said_not_to_be_comparable(
    folders: Folders, change: dict[str, Any], name: str | None
) -> None:
    asked = probes(3, 10, 1.0, 1) | {"seed": 1234}
    asked["recurrence"]["sequences"] = 32
    for variant, own in (("dense", asked), ("hybrid", asked), ("window", asked | change)):
        result(folders, Run(variant), [4.0, 2.0], 1.0)
        folders.probes(Run(variant)).write_text(json.dumps(own))
    said = f"Probes differ in {name} (window-16k-seed1), and are not comparable."
    assert (said in write_report(folders)[0].read_text()) == (name is not None)


def test_a_phase_after_the_schedule_s_end_is_said_to_be_at_its_lowest_rate(folders: Folders) -> None:
    result(folders, Run("window", "64k"), [4.0, 2.0], 1.0)
    write_report(folders)
    report = (folders.root / "quality.md").read_text()
    assert "at the learning rate's lowest value, to which phase 32k has decayed it" in report
    assert "a run that takes longer is read before its end." in report
    result(folders, Run("window", "32k"), [4.0, 2.0], 1.0)
    folders.result(Run("window", "64k")).unlink()
    write_report(folders)
    report = (folders.root / "quality.md").read_text()
    assert "lowest value" not in report
    assert "in the middle of its learning-rate schedule." in report


@pytest.mark.parametrize(("there", "missing"), [("16k", "16k"), ("rehearsal", "rehearsal")])
def test_the_report_names_runs_of_its_models_that_have_no_result(folders: Folders, there: str, missing: str) -> None:
    result(folders, Run("hybrid", there), [4.0, 2.0], 1.0)
    last = write_report(folders)[0].read_text().splitlines()[-1]
    assert f"dense-{missing}-seed1" in last
    assert ("rehearsal" in last) != ("16k" in last)


def test_the_report_has_a_table_with_the_spread_of_seeds_and_pictures(folders: Folders) -> None:
    for seed, loss in ((1, 2.0), (2, 2.5)):
        result(folders, Run("hybrid", seed=seed), [4.0, loss], 1.0)
    result(folders, Run("window", "32k"), [4.0, 3.0], 1.0, gpus=2)
    text, *pictures = write_report(folders)
    report = text.read_text()
    assert "| hybrid | 2 | 1 | 0.5000 | 2.2500 [2.0000, 2.5000] |" in report
    assert "| window | 1 | 2 | 0.5000 | 3.0000 |" in report
    assert "| 100 | 25.0% | 10.0 |" in report  # tokens/s of one GPU
    assert "| hybrid | 3.2500 [3.0000, 3.5000] | 1.2500 [1.0000, 1.5000] |" in report
    assert "dense-16k-seed1" in report.splitlines()[-1]  # without a result
    for picture in pictures:
        with Image.open(picture) as drawn:
            assert drawn.width > 2 * drawn.height  # two panels


def test_needles_of_seeds_are_counted_together_and_drawn_nowhere(folders: Folders) -> None:
    for seed, correct in ((1, 3), (2, 5)):
        run = Run("dense", "16k-needles", seed)
        result(folders, run, [4.0, 2.0], 1.0)
        cells_of = [{"length": 4096, "depth": depth, "correct": correct, "trials": 10} for depth in (0.0, 1.0)]
        folders.needles(run).write_text(json.dumps({"tasks": {"single": {"cells": cells_of}}}))
    [text] = write_report(folders)
    report = text.read_text()
    assert "single at 4,096" in report
    assert "trained for 20M tokens on documents full of\nneedles; learning rate 0.0005, 100 tokens a step." in report
    assert cells(report, "dense") == ["dense", "2", "0.5000", "40% [26%, 55%]", "2.0000 [2.0000, 2.0000]"]
    assert "![" not in report


@pytest.mark.parametrize(
    ("settings", "depths", "said"),
    [
        ({"seed": 7, "weights": "b"}, (0.0, 1.0), "Needles differ in seed (window-16k-needles-seed1)"),
        ({"seed": 1234, "weights": "b"}, (0.5,), "Needles differ in depths (window-16k-needles-seed1)"),
        ({"seed": 1234, "weights": "b"}, (0.0, 1.0), None),
    ],
)
def test_needles_of_other_settings_are_said_not_to_be_comparable(
    folders: Folders, settings: dict[str, Any], depths: tuple[float, ...], said: str | None
) -> None:
    alike = {"seed": 1234, "weights": "a"}, (0.0, 1.0)
    for variant, (own, at) in {"dense": alike, "hybrid": alike, "window": (settings, depths)}.items():
        run = Run(variant, "16k-needles")
        result(folders, run, [4.0, 2.0], 1.0)
        found = [{"length": 4096, "depth": depth, "correct": 3, "trials": 10} for depth in at]
        folders.needles(run).write_text(json.dumps({"tasks": {"single": {"cells": found, "settings": own}}}))
    report = write_report(folders)[0].read_text()
    assert (said in report) if said else ("Needles differ" not in report)


def test_runs_that_shared_a_gpu_have_no_times(folders: Folders) -> None:
    for variant, is_shared in (("dense", False), ("hybrid", True)):
        result(folders, Run(variant), [4.0, 2.0], 1.0, shared_gpu=is_shared)
    report = write_report(folders)[0].read_text()
    assert cells(report, "dense")[5:] == ["", "2.0000", "100", "25.0%", "10.0"]
    assert cells(report, "hybrid")[5:] == ["+0.0000", "–", "–", "–", "10.0"]
    assert "shared their GPU" in report


def test_the_speed_of_runs_that_shared_a_gpu_is_measured_alone(folders: Folders) -> None:
    result(folders, Run("hybrid"), [4.0, 2.0], 1.0, shared_gpu=True)
    measured(folders, hybrid=400)
    report = write_report(folders)[0].read_text()
    assert cells(report, "hybrid")[5:] == ["–", "2.0000", "400", "25.0%", "10.0"]


def test_the_gpu_time_of_runs_that_shared_a_gpu_is_that_of_their_measured_speed(folders: Folders) -> None:
    result(folders, Run("dense"), [4.0, 2.0], step_s=0.5)
    result(folders, Run("hybrid"), [5.0, 3.0], step_s=4.0, shared_gpu=True)  # 25 tokens/s
    measured(folders, hybrid=100)
    dense, hybrid = groups(read_results(folders), speed.read(folders))["16k"]
    slow = [seconds for _, seconds, _ in hybrid.results[0].held_out]
    assert hybrid.gpu_seconds(hybrid.results[0]) == [seconds / 4 for seconds in slow]
    assert common_gpu_seconds([dense, hybrid]) == 10


def test_times_of_runs_on_more_gpus_are_those_of_first_steps_on_the_fewest(folders: Folders) -> None:
    result(folders, Run("dense"), [4.0, 2.0], step_s=1.0)
    for variant in ("hybrid", "window"):
        result(folders, Run(variant), [5.0, 3.0], step_s=2.0, gpus=4)  # 50 tokens/s per GPU
    measured(folders, hybrid=100)
    report = write_report(folders)[0].read_text()
    assert cells(report, "hybrid")[6:9] == ["3.0000", "100", "25.0%"]
    assert cells(report, "window")[6:9] == ["–", "–", "–"]
    assert "those of 1 GPU: of other runs, those of first steps on\n1 GPU, or –." in report
    assert "is not drawn: phase 16k: window." in report


def test_memory_is_that_of_the_gpus_whose_throughput_is_given(folders: Folders) -> None:
    result(folders, Run("dense"), [4.0, 2.0], step_s=1.0)
    for variant in ("hybrid", "window"):
        on_four = {"summary": asdict(summary(200.0)) | {"peak_memory_gib": 4.0}}
        result(folders, Run(variant), [5.0, 3.0], step_s=2.0, gpus=4, **on_four)
    measured(folders, hybrid=100)
    report = write_report(folders)[0].read_text()
    assert [cells(report, variant)[9] for variant in ("dense", "hybrid", "window")] == ["10.0", "10.0", "–"]


def test_times_of_several_gpu_models_are_left_out_and_named(folders: Folders) -> None:
    for variant, device in (("dense", "NVIDIA H200"), ("hybrid", "NVIDIA H100")):
        result(folders, Run(variant), [4.0, 2.0], 1.0, environment={"device": device})
    text, *pictures = write_report(folders)
    report = text.read_text()
    assert cells(report, "hybrid")[4:] == ["2.0000", "+0.0000", "–", "–", "–", "10.0"]
    assert "are left out (NVIDIA H200: dense; NVIDIA H100: hybrid)." in report
    assert "is not drawn: phase 16k, timed on several GPU models." in report
    assert [picture.name for picture in pictures] == ["quality.png"]


def test_first_steps_of_another_gpu_model_are_not_compared_either(folders: Folders) -> None:
    result(folders, Run("dense"), [4.0, 2.0], 1.0, environment={"device": "NVIDIA H200"})
    result(folders, Run("hybrid"), [4.0, 2.0], 1.0, shared_gpu=True, environment={"device": "NVIDIA H200"})
    measured(folders, hybrid=400)
    assert "several GPU models" not in write_report(folders)[0].read_text()
    content = json.loads(folders.speed.read_text()) | {"environment": {"device": "NVIDIA H100"}}
    folders.speed.write_text(json.dumps(content))
    assert "(NVIDIA H200: dense; NVIDIA H100: hybrid)" in write_report(folders)[0].read_text()


def test_a_run_whose_first_evaluation_comes_later_has_no_loss_at_that_time(folders: Folders) -> None:
    result(folders, Run("dense"), [4.0, 2.0], step_s=1.0)
    result(folders, Run("hybrid"), [5.0, 3.0], step_s=2.5)
    dense, hybrid = groups(read_results(folders))["16k"]
    assert (dense.losses_at(20), hybrid.losses_at(20)) == ([2.0], [])


def test_the_report_shows_how_much_the_loss_changes_at_late_positions(folders: Folders) -> None:
    for seed, last in ((1, 2.5), (2, 2.75)):
        positions = [[0, 1024, 3.0], [1024, 2048, 2.75], [2048, 4096, last]]
        result(folders, Run("hybrid", seed=seed), [4.0, 2.0], 1.0, by_position=positions)
    report = write_report(folders)[0].read_text()
    [row] = [line for line in report.splitlines() if line.startswith("| hybrid | 3.0000 [")]
    assert row.endswith("| 2.6250 [2.5000, 2.7500] | -0.3750 [-0.5000, -0.2500] |")


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """Panels of the pictures that were saved."""
    drawn: list[Axes] = []
    save = Figure.savefig

    def look(figure: Figure, *arguments: Any, **named: Any) -> None:
        drawn.extend(figure.axes)
        save(figure, *arguments, **named)

    monkeypatch.setattr(Figure, "savefig", look)
    return drawn


def test_only_phases_and_kinds_with_a_speed_are_drawn_against_it(folders: Folders, axes: list[Axes]) -> None:
    for variant in ("dense", "hybrid", "window"):
        result(folders, Run(variant), [4.0, 2.0], 1.0, shared_gpu=variant != "dense")
        result(folders, Run(variant, "16k-40m"), [4.0, 2.0], 1.0, shared_gpu=True)
    measured(folders, hybrid=400)
    text, _, picture = write_report(folders)
    position, speed = "Position in the sequence, up to", "Training tokens/s per GPU"
    assert [panel.get_xlabel() for panel in axes] == [position, position, speed]
    assert axes[0].get_ylabel() == "Held-out loss less dense’s (nats per token)"
    assert [label.get_text() for label in axes[2].texts] == ["dense", "hybrid"]
    report = text.read_text()
    assert f"]({picture.name})" in report
    assert "is not drawn: phase 16k: window; phase 16k-40m.\n" in report


def test_a_report_without_speeds_has_no_picture_of_them(folders: Folders) -> None:
    result(folders, Run("dense"), [4.0, 2.0], 1.0)
    stale = write_report(folders)[2]
    assert stale.is_file()
    result(folders, Run("dense"), [4.0, 2.0], 1.0, shared_gpu=True)
    assert len(write_report(folders)) == 2
    assert not stale.exists()


def test_variants_are_compared_with_dense_runs_of_their_seeds(folders: Folders) -> None:
    for variant, losses in (("dense", (2.0, 3.0)), ("hybrid", (2.1, 3.3)), ("window", (1.75,))):
        for seed, loss in enumerate(losses, start=1):
            result(folders, Run(variant, seed=seed), [4.0, loss], 1.0)
    report = write_report(folders)[0].read_text()
    differences = [cells(report, variant)[5] for variant in ("dense", "hybrid", "window")]
    assert differences == ["", "+0.2000 [+0.1000, +0.3000]", "-0.2500"]


def test_an_expected_density_is_named_so(folders: Folders) -> None:
    result(folders, Run("hyper"), [4.0, 2.0], 1.0, counts_exactly=False)
    result(folders, Run("hybrid"), [4.0, 2.0], 1.0)
    report = write_report(folders)[0].read_text()
    assert [cells(report, variant)[3] for variant in ("hyper", "hybrid")] == ["0.5000 expected", "0.5000"]


def test_recall_over_training_is_thinned_to_twenty_points_with_the_last() -> None:
    records = [
        {"step": step, f"{NAME}_recall_by_layer": {"1": step / 1000, "2": 1.0}, f"{NAME}_kl_by_layer": {"1": 2.0}}
        for step in range(1, 998)
    ]
    curve = recall_curve([{"step": 0}, *records])
    assert len(curve) == 20
    assert curve[-1] == Recall(997, (0.997 + 1) / 2, 0.997, 1.0, 2.0)
    gaps = {later.step - earlier.step for earlier, later in itertools.pairwise(curve)}
    assert max(gaps) - min(gaps) <= 1


def test_values_of_recall_that_are_not_finite_are_left_out() -> None:
    names = [f"{NAME}_recall_by_layer", f"{NAME}_kl_by_layer"]
    [point] = recall_curve([{"step": 1, names[0]: {"1": None, "2": 0.5}}, {"step": 2, names[0]: {"1": None}}])
    assert point == Recall(1, 0.5, 0.5, 0.5, None)


def test_the_report_shows_recall_by_step_over_layers_and_seeds(folders: Folders) -> None:
    for seed, recall in ((1, 0.5), (2, 0.7)):
        curve = [asdict(Recall(step, recall, recall - 0.1, recall + 0.1, None)) for step in (10, 20)]
        result(folders, Run("moba", seed=seed), [4.0, 2.0], 1.0, recall=curve)
    result(folders, Run("hybrid"), [4.0, 2.0], 1.0)
    report = write_report(folders)[0].read_text()
    assert "| step | moba |\n| --- | --- |\n| 10 | 0.600 [0.400, 0.800] |\n| 20 | 0.600" in report


def test_a_report_without_selected_blocks_has_no_recall(folders: Folders) -> None:
    result(folders, Run("hybrid"), [4.0, 2.0], 1.0)
    assert "Recall" not in write_report(folders)[0].read_text()


def test_a_result_is_made_of_metrics_and_counts_gpu_seconds(folders: Folders) -> None:
    run = Run("dense", "64k")
    report = {
        "loss": 3.0, "step_time_s": 0.5, "tokens_per_s": 10.0, "model_tflops": 1.0, "memory_gib": 2.0,
        "held_out_loss_by_position": [[0, 64, 3.5]],
    }  # fmt: skip
    records = [report | {"step": step, "consumed_tokens": 7 * step, "held_out_loss": 10 / step} for step in (12, 14)]
    folders.run(run).mkdir(parents=True)
    (folders.run(run) / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    save_result(
        folders, run, recipe=Recipe(1e-3, 100), density=1.0, gpus=2, settings=["+model=tiny_dense"], first_step=10
    )
    [found] = read_results(folders)
    assert found.held_out == [(84, 2 * 2 * 0.5, 10 / 12), (98, 4 * 2 * 0.5, 10 / 14)]
    assert (found.run, found.gpus, found.by_position) == (run, 2, [(0, 64, 3.5)])
    assert (found.counts_exactly, found.shared_gpu, found.recall) == (True, False, ())


def test_an_earlier_held_out_loss_does_not_stand_for_a_last_one_that_is_not_finite(folders: Folders) -> None:
    run = Run("dense")
    report = {
        "loss": 3.0, "step_time_s": 0.5, "tokens_per_s": 10.0, "model_tflops": 1.0, "memory_gib": 2.0,
        "held_out_loss_by_position": [], "consumed_tokens": 1,
    }  # fmt: skip
    records = [report | {"step": step, "held_out_loss": loss} for step, loss in ((1, 2.0), (2, None))]
    folders.run(run).mkdir(parents=True)
    (folders.run(run) / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(ConfigError, match="ends without a finite held-out loss"):
        save_result(folders, run, recipe=Recipe(1e-3, 100), density=1.0, gpus=1, settings=["+model=tiny_dense"])


def test_a_result_keeps_recall_and_whether_its_gpu_was_shared(folders: Folders) -> None:
    run = Run("hyper", "16k-40m")
    report = {
        "step": 10, "consumed_tokens": 100, "loss": 3.0, "step_time_s": 0.5, "tokens_per_s": 10.0, "model_tflops": 1.0,
        "memory_gib": 2.0, "held_out_loss": 3.0, "held_out_loss_by_position": [[0, 64, 3.5]],
        f"{NAME}_recall_by_layer": {"1": 0.25, "2": 0.75},
    }  # fmt: skip
    folders.run(run).mkdir(parents=True)
    (folders.run(run) / "metrics.jsonl").write_text(json.dumps(report) + "\n")
    settings = train_settings(folders, run, Recipe(1e-3, 1 << 15))
    save_result(folders, run, recipe=Recipe(1e-3, 100), density=0.4, gpus=1, settings=settings, shared_gpu=True)
    [found] = read_results(folders)
    assert (found.counts_exactly, found.shared_gpu) == (False, True)
    assert found.recall == (Recall(10, 0.5, 0.25, 0.75, None),)


def test_a_study_without_results_is_rejected(folders: Folders) -> None:
    with pytest.raises(ConfigError, match="holds no results"):
        write_report(folders)


def test_another_file_among_the_results_is_rejected(folders: Folders) -> None:
    folders.results.mkdir()
    (folders.results / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match="no result of this study"):
        read_results(folders)


@pytest.mark.parametrize(
    "change",
    [
        {"run": {"variant": "dense", "phase": "16k", "seed": "1"}},
        {"gpus": 0},
        {"density": None},
        {"summary": asdict(summary(0.0))},
        {"held_out": [[1000, 10, float("nan")]]},
        {"held_out": [[1000, None, 2.0]]},
        {"by_position": []},
        {"by_position": [[0, 64, "2.0"]]},
        {"settings": ["train.steps"]},
        {"texts": ["train"]},
        {"environment": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_result_with_a_value_that_is_none_is_named(folders: Folders, change: dict[str, Any]) -> None:
    result(folders, run := Run("dense"), [4.0, 2.0], 1.0)
    folders.result(run).write_text(json.dumps(json.loads(folders.result(run).read_text()) | change))
    with pytest.raises(ConfigError, match=r"dense-16k-seed1\.json: is no result of this study"):
        write_report(folders)


@pytest.mark.parametrize(
    "change",
    [
        {"completion": [{"length": 1024, "with_definition": {"correct": 1, "trials": 2}}]},
        {"completion": probes(1, 0, 1.0, 1)["completion"]},
        {"completion": probes(3, 2, 1.0, 1)["completion"]},
        {"recurrence": probes(1, 2, 1.0, 0)["recurrence"]},
        {"recurrence": {"by_distance": [{"from": 64, "count": 1, "second_loss": None, "first_loss": 1.0}]}},
    ],
)
def test_damaged_probes_are_named(folders: Folders, change: dict[str, Any]) -> None:
    result(folders, run := Run("dense"), [4.0, 2.0], 1.0)
    folders.probes(run).write_text(json.dumps(probes(1, 2, 1.0, 1) | change))
    with pytest.raises(ConfigError, match=r"seed1-probes\.json: is no result of this study"):
        write_report(folders)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("probes", probes(1, 2, 1.0, 1) | {"checkpoint": "/q/runs/window-16k-seed1/checkpoints/iter_0000002"}),
        ("needles", {"run": asdict(Run("window")), "tasks": {}}),
    ],
)
def test_probes_and_needles_of_another_run_are_named(folders: Folders, kind: str, content: dict[str, Any]) -> None:
    result(folders, Run("dense"), [4.0, 2.0], 1.0)
    (folders.results / f"dense-16k-seed1-{kind}.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=rf"seed1-{kind}\.json: holds the {kind} of .*window-16k-seed1"):
        write_report(folders)


@pytest.mark.parametrize("kind", ["probes", "needles"])
def test_probes_and_needles_without_the_result_of_their_run_are_named(folders: Folders, kind: str) -> None:
    result(folders, Run("dense"), [4.0, 2.0], 1.0)
    (folders.results / f"hybrid-16k-seed1-{kind}.json").write_text("{}")
    with pytest.raises(ConfigError, match=rf"hybrid-16k-seed1-{kind}\.json: .*Copy hybrid-16k-seed1\.json there too"):
        write_report(folders)


@pytest.mark.parametrize(
    "content",
    [
        '{"tasks"',
        '{"tasks": [1]}',
        '{"tasks": {"single": {"cells": [{"length": 1}]}}}',
        '{"tasks": {"single": {"cells": [{"length": 1, "depth": 0.5, "correct": 0, "trials": 0}]}}}',
    ],
)
def test_a_damaged_file_of_needles_is_named(content: str, folders: Folders) -> None:
    result(folders, run := Run("dense", "16k-needles"), [4.0, 2.0], 1.0)
    folders.needles(run).write_text(content)
    with pytest.raises(ConfigError, match=r"seed1-needles\.json: is no result of this study"):
        write_report(folders)


@pytest.mark.parametrize("name", ["speed.json", "dense-16k-seed1-probes.json", "other.json"])
def test_a_cut_file_or_a_folder_among_the_results_is_named(name: str, folders: Folders) -> None:
    result(folders, Run("dense"), [4.0, 2.0], 1.0)
    path = folders.results / name
    for content in ('{"rows": {"den', "{}", "[]"):
        path.write_text(content)
        with pytest.raises(ConfigError, match=rf"{name}: is no result of this study"):
            write_report(folders)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match=rf"{name}: is no result of this study"):
        write_report(folders)


def test_a_result_without_a_held_out_loss_is_named(folders: Folders) -> None:
    result(folders, Run("dense"), [4.0, 2.0], 1.0, held_out=[])
    with pytest.raises(ConfigError, match=r"dense-16k-seed1\.json: is no result of this study"):
        write_report(folders)


def test_a_copy_of_a_result_is_no_further_seed(folders: Folders) -> None:
    result(folders, run := Run("dense"), [4.0, 2.0], 1.0)
    (folders.results / "dense-16k-seed1-copy.json").write_bytes(folders.result(run).read_bytes())
    with pytest.raises(ConfigError, match=r"copy\.json: holds the result of dense-16k-seed1\. Move it away"):
        read_results(folders)


def test_a_result_of_an_unknown_phase_is_named(folders: Folders) -> None:
    result(folders, Run("dense", "17k"), [4.0, 2.0], 1.0)
    with pytest.raises(ConfigError, match=r"dense-17k-seed1\.json: is of phase 17k, and this version has 16k, "):
        write_report(folders)


def test_losses_of_other_positions_are_named(folders: Folders) -> None:
    result(folders, Run("dense"), [4.0, 2.0], 1.0)
    result(folders, Run("dense", seed=2), [4.0, 2.0], 1.0, by_position=[[0, 64, 1.0]])
    with pytest.raises(ConfigError, match=r"seed2\.json: its losses are of other positions than those of .*seed1"):
        write_report(folders)


def test_runs_of_several_recipes_are_said_not_to_be_comparable(folders: Folders) -> None:
    for variant in ("dense", "hybrid", "window"):
        result(folders, Run(variant), [4.0, 2.0], 1.0)
    text, *_ = write_report(folders)
    assert "several recipes" not in text.read_text()
    result(folders, Run("window"), [4.0, 2.0], 1.0, recipe={"lr": 2e-3, "batch_tokens": 100})
    write_report(folders)
    said = "several recipes, and are not comparable (learning rate 0.002, 100 tokens a step: window-16k-seed1)."
    assert said in text.read_text()


def test_runs_of_several_models_are_said_not_to_be_comparable(folders: Folders) -> None:
    shared = ["model.num_layers=16", "optim.lr=1e-3"]
    for variant in ("dense", "hybrid", "window"):
        result(folders, Run(variant), [4.0, 2.0], 1.0, settings=[*shared, f"model.name={variant}", "seed=1"])
    text, *_ = write_report(folders)
    assert "several models" not in text.read_text()
    result(folders, Run("window"), [4.0, 2.0], 1.0, settings=[*shared, "model.num_layers=4"])
    write_report(folders)
    said = "several models or optimizers, and are not comparable (model.num_layers=4 optim.lr=1e-3: window-16k-seed1)."
    assert said in text.read_text()


def test_runs_on_several_texts_are_said_not_to_be_comparable(folders: Folders) -> None:
    texts = {"train": "a", "held-out": "b", "tokenizer": "c"}
    result(folders, Run("dense"), [4.0, 2.0], 1.0)  # of an earlier version, which did not record them
    result(folders, Run("hybrid"), [4.0, 2.0], 1.0, texts=texts)
    text, *_ = write_report(folders)
    assert "several texts" not in text.read_text()
    result(folders, Run("window"), [4.0, 2.0], 1.0, texts=texts | {"train": "d"})
    write_report(folders)
    assert "Held-out losses are of runs on several texts or tokenizers, and not comparable." in text.read_text()
