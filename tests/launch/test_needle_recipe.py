"""launch/needle_recipe.py: its commands are valid, follow on one another, and fit the time they are meant for."""

import json
import math
import runpy
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from s2train.checkpoints.folders import Progress, write_config
from s2train.command_line.commands import hydra_setting, python_command
from s2train.config import PretrainConfig, to_object
from s2train.data.tokenizers import ByteTokenizer
from s2train.environment.hardware import Hardware
from s2train.needles.documents import needle_documents
from s2train.needles.results import Cell, CellReach
from s2train.planning import check, compose_run
from s2train.preparation.config import PrepareConfig, register
from tests.launch.waited_for import ONCE_WAITED_FOR, note_waits
from tests.program import AWKWARD_NAME, run

ROOT = Path(__file__).parents[2]
H100 = Hardware("NVIDIA H100 80GB HBM3", "cuda", 85_017_624_576)


@pytest.fixture(scope="module", autouse=True)
def launch_on_the_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "launch")
        yield


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    # Dataclasses of a module look it up by name.
    module = type(sys)("needle_recipe")
    sys.modules["needle_recipe"] = module
    module.__dict__.update(runpy.run_path(str(ROOT / "launch" / "needle_recipe.py"), run_name="needle_recipe"))
    return module.__dict__


@pytest.fixture(scope="module")
def curves() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "launch" / "needle_curves.py"))


def trained(run: Path) -> None:
    """A phase's folder with one report in it."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text('{"step": 10, "step_time_s": 0.5, "held_out_loss": 2.5}\n')


SMALL = [
    "model.hidden_size=32",
    "model.ffn_hidden_size=32",
    "train.precision=fp32",
    "data.num_workers=0",
    "tracking.wandb=disabled",
    "optim.warmup_steps=1",
]


def preparation(overrides: list[str]) -> PrepareConfig:
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg: PrepareConfig = to_object(compose("prepare_data", overrides=overrides))
    return cfg


def training(recipe: dict[str, Any], root: Path, variant: str, number: int) -> PretrainConfig:
    return compose_run(recipe["train_command"](root, variant, number)[1:])


def test_every_phase_and_every_variant_can_run_on_one_gpu(recipe: dict[str, Any], tmp_path: Path) -> None:
    phases, longest = recipe["PHASES"], len(recipe["PHASES"]) - 1
    runs = {("hybrid", number) for number in range(longest)} | {(variant, longest) for variant in recipe["VARIANTS"]}
    for variant, number in runs:
        cfg = training(recipe, tmp_path, variant, number)
        assert cfg.model.name == f"needle_{variant}"
        assert cfg.train.seq_length == phases[number].length
        assert check(cfg, 1, H100).fits


def test_a_phase_begins_where_the_one_before_ended(recipe: dict[str, Any], tmp_path: Path) -> None:
    first, *later = (training(recipe, tmp_path, "hybrid", number) for number in range(len(recipe["PHASES"])))
    assert (first.checkpoint.resume, first.checkpoint.new_data) == ("auto", False)
    before = first
    for cfg in later:
        assert (cfg.checkpoint.resume, cfg.checkpoint.new_data) == (before.run_dir, True)
        assert cfg.train.steps > before.train.steps
        before = cfg
    assert before.optim.decay_steps == before.train.steps


def test_an_unfinished_phase_resumes_from_its_own_checkpoint(recipe: dict[str, Any], tmp_path: Path) -> None:
    (recipe["run_folder"](tmp_path, "dense", 1) / "checkpoints" / "iter_0004001").mkdir(parents=True)
    cfg = training(recipe, tmp_path, "dense", 1)
    assert (cfg.checkpoint.resume, cfg.checkpoint.new_data) == ("auto", False)
    assert not recipe["is_trained"](tmp_path, "dense", 1)


def test_an_archive_of_a_checkpoint_starts_no_phase(recipe: dict[str, Any], tmp_path: Path) -> None:
    folder = recipe["run_folder"](tmp_path, "dense", 1) / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "iter_0004001.tar").touch()
    assert training(recipe, tmp_path, "dense", 1).checkpoint.new_data


def test_there_are_documents_for_all_steps_and_each_fills_a_sequence(recipe: dict[str, Any], tmp_path: Path) -> None:
    ends = recipe["PHASES"][0], recipe["PHASES"][-1]
    for phase in recipe["PHASES"]:
        made = 0
        for command in recipe["data_commands"](tmp_path, phase):
            cfg = preparation(command[1:])
            assert cfg.needles.length == phase.length
            made += cfg.needles.documents
            if phase not in ends:
                continue
            cfg.needles.documents = 1
            assert [len(d) for d in needle_documents(cfg.needles, ByteTokenizer(), cfg.seed)] == [phase.length]
        assert made * (1 - recipe["HELD_OUT"]) > phase.samples


def test_a_phase_takes_ten_minutes_at_most_as_predicted_and_the_hybrid_all_of_them(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    for variant in set(recipe["VARIANTS"]).difference(recipe["UNPREDICTED"]):
        seconds = []
        for number, phase in enumerate(recipe["PHASES"]):
            costs = recipe["phase_costs"](tmp_path, variant, number)
            to_start_and_save = 30
            seconds.append(phase.samples * (costs.linear_seconds + 2 * costs.attention_seconds) + to_start_and_save)
        assert (sum(seconds) if variant == "hybrid" else max(seconds)) < 600


def test_an_unknown_variant_composes_to_nothing(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(HydraException, match="needle_spare"):
        training(recipe, tmp_path, "spare", 0)


@pytest.mark.parametrize("action", ["plan", "data", "evaluate", "curve"])
def test_settings_that_an_action_would_not_use_are_rejected(
    action: str, recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        recipe["main"]([action, "hybrid", "seed=2"])
    assert f"apply to train and extend only; {action} takes none" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["evaluate", "curve"])
def test_what_is_not_trained_is_not_evaluated(action: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"of hybrid .*needle_recipe\.py train hybrid --root"):
        recipe["main"]([action, "hybrid", "--root", str(tmp_path)])


def test_training_without_data_names_the_command_that_makes_them(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no data in .*needle_recipe\.py data --root"):
        recipe["main"](["train", "hybrid", "--root", str(tmp_path)])


def test_a_phase_that_was_trained_with_other_settings_is_not_taken_for_one_with_these(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    first = recipe["run_folder"](tmp_path, "hybrid", 0)
    checkpoint = first / "checkpoints" / f"iter_{recipe['last_step'](0):07d}"
    checkpoint.mkdir(parents=True)
    Progress(1, 1, {}, None).write(checkpoint / "progress.json")
    write_config(training(recipe, tmp_path, "hybrid", 0), first / "config.yaml")
    last, otherwise = len(recipe["PHASES"]) - 1, recipe["trained_otherwise"]
    assert f"{first} was trained with seed=1234" in otherwise(tmp_path, "hybrid", last, ["seed=2"])
    assert otherwise(tmp_path, "hybrid", last, ["seed=1234", "tracking.wandb=offline"]) is None


def test_pictures_are_not_overwritten_nor_drawn_of_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = runpy.run_path(str(ROOT / "launch" / "needle_curves.py"))
    (tmp_path / "out.png").write_text("mine")
    for root, name, words in (
        (tmp_path / "none", "out", "no such folder"),
        (tmp_path, "out", "not overwritten"),
        (tmp_path, "new", "no variant in it has metrics.jsonl"),
    ):
        monkeypatch.setattr(sys, "argv", ["needle_curves.py", str(root), str(tmp_path / name)])
        with pytest.raises(SystemExit):
            picture["main"]()
        assert words in capsys.readouterr().err
    assert (tmp_path / "out.png").read_text() == "mine"
    assert not (tmp_path / "new.png").exists()


def test_earlier_pictures_variants_are_drawn_beside_and_named_with_their_file(
    tmp_path: Path, curves: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw(name: str, *beside: str) -> dict[str, Any]:
        trained(tmp_path / name / name / "512")
        output = tmp_path / f"{name}{len(beside)}"
        options = [word for file in beside for word in ("--beside", file)]
        monkeypatch.setattr(sys, "argv", ["needle_curves.py", *options, str(tmp_path / name), str(output)])
        curves["main"]()
        content: dict[str, Any] = json.loads(output.with_suffix(".json").read_text())
        return content

    earlier = str(tmp_path / "dense0.json")
    assert draw("dense")["variants"]["dense"]["held_out_loss"] == {"512": 2.5}
    content = draw("hybrid", earlier)
    assert (content["variants"].keys(), content["beside"]) == ({"hybrid"}, {"dense": earlier})
    for name, file, words in (("dense", earlier, "dense occurs twice"), ("spare", "none", "not an OUTPUT.json")):
        with pytest.raises(SystemExit):
            draw(name, file)
        assert words in capsys.readouterr().err


GRID: dict[str, Any] = {
    "checkpoint": "runs/x", "step": 1, "settings": {}, "lengths": [128], "depths": [0.0], "threshold": 0.85,
    "cells": [{"length": 128, "depth": 0.0, "correct": 1, "trials": 2, "token_accuracy": 1, "character_accuracy": 1}],
}  # fmt: skip
VARIANT: dict[str, Any] = {"points": [[10, 128, 1, 2]], "seconds": {"512": 1.5}, "grid": GRID}


def test_what_earlier_pictures_leave_behind_can_be_read_with_a_grid_and_without(
    tmp_path: Path, curves: dict[str, Any]
) -> None:
    variants = {"with": VARIANT, "without": VARIANT | {"grid": None}}
    (tmp_path / "out.json").write_text(json.dumps({"variants": variants}))
    assert curves["read_earlier"](tmp_path / "out.json") == variants
    curves["draw"](variants, tmp_path / "out.png")


@pytest.mark.parametrize(
    "variants",
    [
        [VARIANT],
        {"dense": None},
        *({"dense": {name: VARIANT[name] for name in VARIANT if name != missing}} for missing in VARIANT),
        {"dense": VARIANT | {"points": [[10, 128, 1]]}},
        {"dense": VARIANT | {"points": [[10, 128, 0, 0]]}},
        {"dense": VARIANT | {"seconds": ["512"]}},
        {"dense": VARIANT | {"grid": {"cells": []}}},
        {"dense": VARIANT | {"grid": GRID | {"cells": [1]}}},
        {"dense": VARIANT | {"grid": [1]}},
    ],
)
def test_an_earlier_file_that_cannot_be_drawn_is_rejected_in_one_line(
    variants: Any, tmp_path: Path, curves: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "out.json"
    file.write_text(json.dumps({"variants": variants}))
    monkeypatch.setattr(sys, "argv", ["needle_curves.py", str(tmp_path), str(tmp_path / "new"), "--beside", str(file)])
    with pytest.raises(SystemExit):
        curves["main"]()
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"--beside {file}: not an OUTPUT.json of this program")
    assert not (tmp_path / "new.png").exists()


def test_a_missing_shared_variant_is_rejected_in_one_line(
    tmp_path: Path, curves: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path / "dense" / "512")
    monkeypatch.setattr(sys, "argv", ["needle_curves.py", str(tmp_path), str(tmp_path / "new"), "--shared", "hybrid"])
    with pytest.raises(SystemExit):
        curves["main"]()
    expected = f"--shared hybrid: not among the variants of {tmp_path}: dense"
    assert capsys.readouterr().err.splitlines()[-1].endswith(expected)


def test_a_variant_is_named_with_its_seed_where_that_is_known(tmp_path: Path, curves: dict[str, Any]) -> None:
    trained(tmp_path / "512")
    variant = curves["read_variant"](tmp_path)
    assert "seed" not in variant
    assert curves["label_of"]("hybrid", variant) == "hybrid"
    (tmp_path / "512" / "config.yaml").write_text("seed: 2\n")
    variant = curves["read_variant"](tmp_path)
    assert variant["seed"] == 2
    assert curves["label_of"]("hybrid", variant) == "hybrid (seed 2)"
    trained(tmp_path / "2048")
    (tmp_path / "2048" / "config.yaml").write_text("seed: 3\n")
    assert "seed" not in curves["read_variant"](tmp_path)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([1, 1], "needle → question: last 1 layer"),
        ([4, None, 2, 3], "needle → question: last 2 to 4 layers"),
        ([1, -1], "needle → question: last 1 layer, or never"),
        ([-1], "needle → question: out of reach"),
        ([None], ""),
    ],
)
def test_a_grid_shows_how_far_its_needles_are(layers: list[int | None], expected: str, curves: dict[str, Any]) -> None:
    reaches = [None if count is None else CellReach(1, count) for count in layers]
    assert curves["describe_reach"]([Cell(128, 0.5, 1, 2, 1.0, 1.0, reach) for reach in reaches]) == expected


CELL = GRID["cells"][0]


@pytest.mark.parametrize(
    ("variant", "known"),
    [
        (VARIANT | {"grid": None}, {"seed": 2}),
        (VARIANT | {"points": []}, {"seed": 2}),
        (VARIANT, {"grid": GRID | {"cells": [CELL | {"reach": {"from_first": 1, "from_last": 2}}]}}),
    ],
    ids=["seed in the legend", "seed above the grid", "reach above the grid"],
)
def test_the_picture_shows_what_is_known(
    variant: dict[str, Any], known: dict[str, Any], tmp_path: Path, curves: dict[str, Any]
) -> None:
    for name, drawn in (("without.png", variant), ("with.png", variant | known)):
        curves["draw"]({"hybrid": drawn}, tmp_path / name)
    assert (tmp_path / "without.png").read_bytes() != (tmp_path / "with.png").read_bytes()


def test_what_a_program_took_is_kept_however_it_ends(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(recipe["Deadline"].run.__globals__, "_LEAST_SECONDS", -math.inf)  # it always starts
    record, program = tmp_path / "hybrid" / "programs.jsonl", tmp_path / "program.py"
    program.write_text("import sys, time; time.sleep(float(sys.argv[1])); sys.exit(int(sys.argv[2]))")
    ended, failed, stopped = ([str(program), *words] for words in (("0.3", "0"), ("0", "3"), ("60", "0")))
    recipe["Deadline"](1).run(ended, record)
    with pytest.raises(SystemExit) as failure:
        recipe["Deadline"](1).run(failed, record)
    assert failure.value.code == 3
    with pytest.raises(SystemExit, match="the same command resumes"):
        recipe["Deadline"](0).run(stopped, record)
    found = [json.loads(line) for line in record.read_text().splitlines()]
    assert [(each["command"], each["status"]) for each in found] == [(ended, 0), (failed, 3), (stopped, -15)]
    assert found[0]["seconds"] >= 0.3
    assert 1 <= found[2]["seconds"] < 60


def test_ctrl_c_waits_for_the_program_that_saves(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note_waits(monkeypatch, recipe["Deadline"].run.__globals__)
    record, program = tmp_path / "programs.jsonl", tmp_path / "program.py"
    interrupts = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(0.5)"
    program.write_text(f"{ONCE_WAITED_FOR}{interrupts}; open(__file__ + '.saved', 'w')")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        recipe["Deadline"](1).run([str(program)], record)
    signal.signal(signal.SIGINT, before)
    assert Path(f"{program}.saved").exists()
    assert json.loads(record.read_text())["status"] == 0


def test_wall_seconds_are_of_all_starts_of_a_phase_and_its_command_is_the_first_that_trained(
    tmp_path: Path, curves: dict[str, Any]
) -> None:
    trained(tmp_path / "512")
    assert not {"wall_seconds", "commands"} & curves["read_variant"](tmp_path).keys()
    runs = [hydra_setting("run_dir", f"{tmp_path}, (v2)/{phase}") for phase in (512, 2048)]
    records = [
        {"command": ["pretrain.py", runs[0], "seed=x"], "seconds": 3.5, "status": 2},
        {"command": ["pretrain.py", runs[0], "data.path=[a, b]"], "seconds": 100.0, "status": -15},
        {"command": ["pretrain.py", runs[0]], "seconds": 50.25, "status": 0},
        {"command": ["pretrain.py", runs[1]], "seconds": 20.0, "status": 0},
        {"command": ["needle.py", "checkpoint=x"], "seconds": 9.0, "status": 0},
    ]
    (tmp_path / "programs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"cut sh')
    variant = curves["read_variant"](tmp_path)
    assert variant["wall_seconds"] == {"512": 153.75, "2048": 20.0}
    first = python_command("pretrain.py", runs[0], "data.path=[a, b]")
    assert variant["commands"] == {"512": first, "2048": python_command("pretrain.py", runs[1])}


def test_nothing_is_started_in_the_last_moments(recipe: dict[str, Any], tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(f"open({str(tmp_path / 'started')!r}, 'w')")
    for start in (lambda late: late.run([str(program)]), lambda late: late.run_together([[str(program)]], 1)):
        with pytest.raises(SystemExit, match="the same command resumes"):
            start(recipe["Deadline"](0.1))
    assert not (tmp_path / "started").exists()


def test_concurrent_programs_have_ended_at_the_time_limit(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(recipe["Deadline"].run.__globals__, "_LEAST_SECONDS", 0)
    program = tmp_path / "program.py"
    program.write_text(
        "import pathlib, signal, sys, time\n"
        "said = pathlib.Path(sys.argv[1])\n"
        "def stop(*_):\n    time.sleep(0.5); said.write_text('saved'); sys.exit()\n"
        "signal.signal(signal.SIGTERM, stop)\nsaid.touch()\ntime.sleep(60)\n"
    )
    said = [tmp_path / name for name in "ab"]

    class OverOnceBothListen(recipe["Deadline"]):  # type: ignore[misc]
        @property
        def _end(self) -> float:
            return 0.0 if all(path.exists() for path in said) else math.inf

        @_end.setter
        def _end(self, end: float) -> None:
            pass

    with pytest.raises(SystemExit, match="the same command resumes"):
        OverOnceBothListen(1).run_together([[str(program), str(path)] for path in said], 2)
    assert [path.read_text() for path in said] == ["saved", "saved"]


def test_the_first_report_after_each_start_counts_as_the_others(tmp_path: Path) -> None:
    def reports(steps: range, *seconds: float) -> list[dict[str, Any]]:
        return [{"step": step, "step_time_s": time} for step, time in zip(steps, seconds, strict=True)]

    start, spike = {"event": "config"}, {"event": "spike", "step": 25}
    run = tmp_path / "512"
    run.mkdir()
    records = [start, *reports(range(10, 30, 10), 9.0, 1.0), spike, *reports(range(30, 40, 10), 1.5)]
    records += [start, {"event": "resume", "step": 30}, *reports(range(40, 60, 10), 8.0, 1.0)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    picture = runpy.run_path(str(ROOT / "launch" / "needle_curves.py"))
    assert picture["read_variant"](tmp_path)["seconds"] == {"512": 10 * (1.0 + 1.0 + 1.5 + 1.0 + 1.0)}


def test_a_phase_has_the_last_recall_of_its_layers_where_blocks_are_selected(
    tmp_path: Path, curves: dict[str, Any]
) -> None:
    for phase, layers in (("512", [{"0": 0.75}, {"0": 0.75, "1": 0.25}]), ("2048", [{}])):
        trained(tmp_path / "sea" / phase)
        with (tmp_path / "sea" / phase / "metrics.jsonl").open("a") as file:
            for recalls in layers:
                file.write(json.dumps({"step": 20, "block_selection_recall_by_layer": recalls}) + "\n")
    assert curves["read_variant"](tmp_path / "sea")["recall"] == {"512": 0.5}
    trained(tmp_path / "dense" / "512")
    assert "recall" not in curves["read_variant"](tmp_path / "dense")


@pytest.mark.slow
def test_a_small_recipe_goes_from_data_to_grid_and_on_where_it_stopped(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(commands: list[list[str]]) -> None:
        for program, *arguments in commands:
            run(Path(program).name, *arguments, processes=0).succeeded()

    records = []
    monkeypatch.setattr(
        recipe["Deadline"], "run", lambda self, command, record=None: (start([command]), records.append(record))
    )
    monkeypatch.setattr(recipe["Deadline"], "run_together", lambda self, commands, at_once: start(commands))
    whole = recipe["PHASES"]
    short = [
        replace(phase, length=length, batch=2, micro=2, steps=2)
        for phase, length in zip(whole, (128, 256), strict=False)
    ]
    folder = tmp_path / AWKWARD_NAME
    main, root = recipe["main"], ["--root", str(folder)]
    # The functions' own globals, which are not the module's here.
    monkeypatch.setitem(main.__globals__, "PHASES", tuple(short))
    monkeypatch.setitem(main.__globals__, "DEPTHS", [0.0, 1.0])
    main(["data", *root])
    main(["train", "hybrid", *root, "--longest", "128", *SMALL])
    assert not recipe["is_trained"](folder, "hybrid", 1)
    main(["train", "hybrid", *root, *SMALL])
    assert recipe["is_trained"](folder, "hybrid", 1)
    monkeypatch.setitem(main.__globals__, "CURVE", (64,))
    main(["curve", "hybrid", *root])
    monkeypatch.setitem(main.__globals__, "GRID", (128, 256))
    main(["evaluate", "hybrid", *root])
    assert records == [None, *[folder / "hybrid" / "programs.jsonl"] * 3]  # data, two phases, the grid
    picture = runpy.run_path(str(ROOT / "launch" / "needle_curves.py"))
    variant = picture["read_variant"](folder / "hybrid")
    assert [point[:2] for point in variant["points"]] == [(2, 64), (4, 64)]
    assert variant["grid"]["lengths"] == [128, 256]
    assert variant["held_out_loss"].keys() == {"128", "256"}
    assert variant["seed"] == PretrainConfig.seed
    picture["draw"]({"hybrid": variant}, folder / "out.png")
    assert (folder / "out.png").stat().st_size > 1000


def test_extending_continues_the_first_phase_at_four_times_its_length_under_yarn(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    before, continued, after = recipe["extend_commands"](tmp_path, "hybrid")
    cfg = compose_run(continued[1:])
    check(cfg, 1, H100)
    scaling = cfg.model.rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_length) == ("yarn", 4.0, 512)
    assert cfg.train.seq_length == 4 * 512
    assert (cfg.checkpoint.resume, cfg.checkpoint.new_data) == (str(tmp_path / "hybrid" / "512"), True)
    assert cfg.run_dir == str(tmp_path / "hybrid" / "2048-yarn")
    assert f"checkpoint={tmp_path / 'hybrid' / '512'}" in before
    assert f"checkpoint={cfg.run_dir}" in after
    assert all("lengths=[2048,8192]" in command for command in (before, after))
    unscaled = training(recipe, tmp_path, "hybrid", 1)
    assert unscaled.model.rope_scaling.kind == "none"
    assert unscaled.run_dir == str(tmp_path / "hybrid" / "2048")


def test_extending_needs_the_first_phase(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"the first phase of hybrid is not trained: first run .* --longest 512"):
        recipe["main"](["extend", "hybrid", "--root", str(tmp_path)])


def test_extending_needs_the_second_phases_data(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "hybrid" / "512" / "checkpoints" / f"iter_{recipe['last_step'](0):07d}").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"no 2048-\w+\.idx in .*: first run .* data --root .* --longest 2048"):
        recipe["main"](["extend", "hybrid", "--root", str(tmp_path)])
