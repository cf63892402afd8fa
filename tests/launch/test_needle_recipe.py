"""launch/needle_recipe.py: its commands are valid, follow on one another, and fit the time they are meant for."""

import json
import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from s2train.config import PrepareConfig, PretrainConfig, register, to_object
from s2train.data.needle_documents import needle_documents
from s2train.data.tokenizers import ByteTokenizer
from s2train.hardware import Hardware
from s2train.planning import check, compose_run
from tests.program import run

ROOT = Path(__file__).parents[2]
H100 = Hardware("NVIDIA H100 80GB HBM3", "cuda", 85_017_624_576)


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    # Dataclasses of a module look it up by name.
    module = type(sys)("needle_recipe")
    sys.modules["needle_recipe"] = module
    module.__dict__.update(runpy.run_path(str(ROOT / "launch" / "needle_recipe.py"), run_name="needle_recipe"))
    return module.__dict__


SMALL = [
    "model.hidden_size=32",
    "model.ffn_hidden_size=32",
    "train.precision=fp32",
    "data.num_workers=0",
    "optim.warmup_steps=1",
]


def preparation(overrides: list[str]) -> PrepareConfig:
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg: PrepareConfig = to_object(compose("prepare_data", overrides=overrides))
    return cfg


def training(recipe: dict[str, Any], root: Path, variant: str, number: int) -> PretrainConfig:
    return compose_run(recipe["train_command"](root, variant, number)[1:])


def test_every_phase_of_every_variant_can_run_on_one_gpu(recipe: dict[str, Any], tmp_path: Path) -> None:
    for variant in recipe["VARIANTS"]:
        for number, phase in enumerate(recipe["PHASES"]):
            cfg = training(recipe, tmp_path, variant, number)
            assert cfg.model.name == f"needle_{variant}"
            assert cfg.train.seq_length == phase.length
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


def test_a_phase_under_way_goes_on_from_its_own_checkpoint(recipe: dict[str, Any], tmp_path: Path) -> None:
    (recipe["run_folder"](tmp_path, "dense", 1) / "checkpoints" / "iter_0004001").mkdir(parents=True)
    cfg = training(recipe, tmp_path, "dense", 1)
    assert (cfg.checkpoint.resume, cfg.checkpoint.new_data) == ("auto", False)
    assert not recipe["is_trained"](tmp_path, "dense", 1)


def test_there_are_documents_for_all_steps_and_each_fills_a_sequence(recipe: dict[str, Any], tmp_path: Path) -> None:
    for phase in recipe["PHASES"]:
        made = 0
        for command in recipe["data_commands"](tmp_path, phase):
            cfg = preparation(command[1:])
            assert cfg.needles.length == phase.length
            made += cfg.needles.documents
            cfg.needles.documents = 2
            assert [len(d) for d in needle_documents(cfg.needles, ByteTokenizer(), cfg.seed)] == [phase.length] * 2
        assert made * (1 - recipe["HELD_OUT"]) > phase.samples


def test_a_phase_takes_ten_minutes_at_most_as_predicted_and_the_hybrid_all_of_them(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    for variant in recipe["VARIANTS"]:
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
def test_settings_that_an_action_would_not_use_are_refused(
    action: str, recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        recipe["main"]([action, "hybrid", "seed=2"])
    assert f"go to train alone; {action} takes none" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["evaluate", "curve"])
def test_what_is_not_trained_is_not_evaluated(action: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"of hybrid .*: train it first"):
        recipe["main"]([action, "hybrid", "--root", str(tmp_path)])


def test_pictures_are_not_overwritten_nor_drawn_of_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = runpy.run_path(str(ROOT / "launch" / "needle_curves.py"))
    (tmp_path / "out.png").write_text("mine")
    for root, words in ((tmp_path / "none", "no such folder"), (tmp_path, "not overwritten")):
        monkeypatch.setattr(sys, "argv", ["needle_curves.py", str(root), str(tmp_path / "out")])
        with pytest.raises(SystemExit):
            picture["main"]()
        assert words in capsys.readouterr().err
    assert (tmp_path / "out.png").read_text() == "mine"


def test_earlier_pictures_variants_are_drawn_beside_and_named_with_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw(name: str, *beside: str) -> dict[str, Any]:
        run = tmp_path / name / name / "512"
        run.mkdir(parents=True, exist_ok=True)
        (run / "metrics.jsonl").write_text('{"step": 10, "step_time_s": 0.5, "held_out_loss": 2.5}\n')
        output = tmp_path / f"{name}{len(beside)}"
        arguments = ["needle_curves.py", str(tmp_path / name), str(output)]
        monkeypatch.setattr(sys, "argv", [*arguments, *(["--beside", *beside] if beside else [])])
        runpy.run_path(str(ROOT / "launch" / "needle_curves.py"))["main"]()
        content: dict[str, Any] = json.loads(output.with_suffix(".json").read_text())
        return content

    earlier = str(tmp_path / "dense0.json")
    assert draw("dense")["variants"]["dense"]["held_out_loss"] == {"512": 2.5}
    content = draw("hybrid", earlier)
    assert (content["variants"].keys(), content["beside"]) == ({"hybrid"}, {"dense": earlier})
    for name, file, words in (("dense", earlier, "dense is there already"), ("spare", "none", "no OUTPUT.json")):
        with pytest.raises(SystemExit):
            draw(name, file)
        assert words in capsys.readouterr().err


def test_nothing_is_started_in_the_last_moments(recipe: dict[str, Any], tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(f"open({str(tmp_path / 'started')!r}, 'w')")
    for start in (lambda late: late.run([str(program)]), lambda late: late.run_together([[str(program)]], 1)):
        with pytest.raises(SystemExit, match="run this again to go on"):
            start(recipe["Deadline"](0.1))
    assert not (tmp_path / "started").exists()


def test_programs_side_by_side_have_ended_when_the_time_is_over(
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

    with pytest.raises(SystemExit, match="run this again to go on"):
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


@pytest.mark.slow
def test_a_small_recipe_goes_from_data_to_grid_and_on_where_it_stopped(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: Any, *commands: list[str]) -> None:
        for program, *arguments in commands:
            done = run(Path(program).name, *arguments, processes=0)
            assert done.status == 0, done.err

    monkeypatch.setattr(recipe["Deadline"], "run", start)
    monkeypatch.setattr(recipe["Deadline"], "run_together", lambda self, commands, at_once: start(self, *commands))
    whole = recipe["PHASES"]
    short = [
        replace(phase, length=length, batch=2, micro=2, steps=2)
        for phase, length in zip(whole, (128, 256), strict=False)
    ]
    main, root = recipe["main"], ["--root", str(tmp_path)]
    # The functions' own globals, which are not the module's here.
    monkeypatch.setitem(main.__globals__, "PHASES", tuple(short))
    main(["data", *root])
    main(["train", "hybrid", *root, "--longest", "128", *SMALL])
    assert not recipe["is_trained"](tmp_path, "hybrid", 1)
    main(["train", "hybrid", *root, *SMALL])
    assert recipe["is_trained"](tmp_path, "hybrid", 1)
    monkeypatch.setitem(main.__globals__, "CURVE", (64, 128))
    main(["curve", "hybrid", *root])
    monkeypatch.setitem(main.__globals__, "GRID", (128, 256))
    main(["evaluate", "hybrid", *root])
    picture = runpy.run_path(str(ROOT / "launch" / "needle_curves.py"))
    variant = picture["read_variant"](tmp_path / "hybrid")
    assert [point[:2] for point in variant["points"]] == [(2, 64), (2, 128), (4, 64), (4, 128)]
    assert variant["grid"]["lengths"] == [128, 256]
    assert variant["held_out_loss"].keys() == {"128", "256"}
    picture["draw"]({"hybrid": variant}, tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 1000
