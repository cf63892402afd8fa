"""Errors of a command line are reported in one line, with the nearest and all valid names."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from s2train.command_line.composition import config_groups, expand_shorthand, explain
from s2train.config import PretrainConfig, register, to_object
from s2train.errors import ConfigError
from s2train.needles.config import NeedleConfig
from s2train.needles.config import register as register_needle
from tests.program import ROOT, Outcome, error_line, run

CONF = ROOT / "conf"


def explained(*overrides: str) -> str:
    """The line on a command line that Hydra rejects."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(HydraException) as error:
        compose("pretrain", overrides=["+model=7b_hybrid", *overrides])
    line = explain(error.value, overrides, config_groups(CONF), PretrainConfig)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("override", "near", "there"),
    [
        ("layout=s2_b64_l16_v61", "layout=s2_b64_l16_v16", "dense, dilated_b64"),
        ("schedule=shiftd", "schedule=shifted", "grouped, homogeneous"),
        ("data=bundeled", "data=bundled", "bundled, mock"),
        ("layout.patern.stride=16", "layout.pattern.stride", "layout.pattern has kind, local, stride"),
        ("layout.pattern.strid=16", "layout.pattern.stride", "layout.pattern has kind, local, stride"),
        ("layout.blocksize=64", "layout.block_size", "layout has layers, block_size"),
        ("stride=16", "layout.pattern.stride", "layout.pattern has"),
        ("layuot=dense", "layout?", "There are model, layout, schedule"),
        ("train.stpes=5", "train.steps", "train has steps"),
    ],
)
def test_a_misspelt_name_is_reported_with_the_nearest_and_the_others(override: str, near: str, there: str) -> None:
    line = explained(override)
    assert line.startswith(override)
    assert f"Did you mean {near}" in line
    assert there in line


def test_a_misspelt_name_in_braces_is_reported_by_itself() -> None:
    line = explained("model.rope_scaling={kind:yarn,factor:4,original_lenght:4096}")
    assert line.startswith("model.rope_scaling.original_lenght=4096: no such setting.")
    assert "Did you mean model.rope_scaling.original_length?" in line


def test_a_size_alone_is_reported_with_all_models_of_that_size() -> None:
    assert "Did you mean +model=7b_dense or +model=7b_hybrid? There are" in explained("model=7b")


def test_the_override_at_fault_is_found_among_right_ones() -> None:
    assert explained("layout=dense", "train.steps=3", "schedule=shiftd", "seed=1").startswith("schedule=shiftd")


def test_a_name_of_a_sweep_is_checked_too() -> None:
    line = explained("layout=dense,s2_b16_l4_v5")
    assert line.startswith("layout=s2_b16_l4_v5")
    assert "layout=s2_b16_l4_v4" in line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps=many", "train.steps=many: Value 'many' of type 'str' could not be converted to Integer"),
        ("layout.pattern.stride=1.5", "could not be converted to Integer. It takes int | None."),
        ("train.seq_length=32k", "It takes int, without a unit: 32000 or 32768."),
        ("train.tokens=1.5B", "It takes float | None, without a unit: 1500000000 or 1610612736."),
        ("model.name=[32k]", "It takes str."),
        ("layout.pattern=5", "Set one of layout.pattern.kind, layout.pattern.local"),
        ("layout.patterns.W={kind:dense}", "Write '+layout.patterns.W={kind:dense}' to add it, or correct its name."),
        ("layout.patterns.W.kind=dense", "Write +layout.patterns.W.kind=dense to add it, or correct its name."),
        ("profile.ranks=1", "Write a list: 'profile.ranks=[1]'."),
        ("profile.steps=10", "Write a list: 'profile.steps=[10,10]'."),
        ("train.deterministic=ture", "It takes true or false."),
        ("optim.lr=[1", "optim.lr=[1: can't be parsed"),
        ("data.split=90,10", "Write 'data.split=[90,10]', or -m for a sweep"),
        ("train.steps", "train.steps: can't be parsed: missing EQUAL"),
        ("profile.steps=1,2", "Write 'profile.steps=[1,2]', or -m for a sweep"),
        ("parallel.tp=1,2", "several values. Name one of them, such as parallel.tp=1, or add -m for a sweep."),
        ("layout=dense,s2_b16_l4_v4", "several files. Name one of them, such as layout=dense, or add -m for a sweep."),
        ("+train.steps=5", "+train.steps=5: has a value already. Write train.steps=5 to change it."),
        ("++schedule=grouped", "Write +schedule=grouped to add it, or schedule=grouped to replace another."),
    ],
)
def test_an_invalid_value_is_reported_with_a_remedy(override: str, words: str) -> None:
    assert words in explained(override)


def test_an_invalid_value_of_a_sweep_is_reported_without_the_others() -> None:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(HydraException) as error:
        compose("pretrain", overrides=["+model=7b_hybrid", "parallel.tp=two"])  # as Hydra composes each job
    line = explain(error.value, ["+model=7b_hybrid", "parallel.tp=1,two"], config_groups(CONF), PretrainConfig)
    assert line.startswith(
        "parallel.tp=two: Value 'two' of type 'str' could not be converted to Integer. It takes int."
    )


def test_braces_that_the_shell_divided_are_reported_with_their_quotes() -> None:
    letter = "+layout.kinds.E"
    line = explained(f"{letter}=kind:block_selection", f"{letter}=top_k:3")
    assert line.endswith("Quote them: '+layout.kinds.E={kind:block_selection,top_k:3}'.")


@pytest.mark.parametrize("split", ["90,10", "90,10,0", "0.9,0.1", "50, 50"])
def test_a_split_is_written_on_a_command_line_as_its_default_is(split: str) -> None:
    register()
    given = expand_shorthand(["+model=7b_hybrid", f"data.split={split}"], PretrainConfig)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert to_object(compose("pretrain", overrides=given)).data.split == split


@pytest.mark.parametrize("given", ["data.split=[90,10]", "data.split=100", "data.split='90,10'", "data.path=[1,a,2,b]"])
def test_other_values_stay_as_they_are(given: str) -> None:
    assert expand_shorthand([given], PretrainConfig) == [given]


def test_a_split_is_swept_over_where_a_sweep_is_asked_for() -> None:
    assert expand_shorthand(["-m", "data.split=90,80"], PretrainConfig) == ["-m", "data.split=90,80"]


@pytest.mark.parametrize("override", ["+layout.pattern.stidre=3", "+optim.learning_rate=1", "+nonsense=1"])
def test_a_plus_adds_no_unknown_setting(override: str) -> None:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("pretrain", overrides=["+model=7b_hybrid", override])
    with pytest.raises(ConfigError, match=rf"^{override[1:].partition('=')[0]}=.*no such setting. Did you mean"):
        to_object(composed)


def test_a_plus_adds_a_letter_with_its_pattern() -> None:
    register()
    overrides = ["+model=7b_hybrid", "layout.layers=DSSW", "+layout.patterns.W={kind:sliding_window,window:8}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = to_object(compose("pretrain", overrides=overrides))
    assert cfg.layout.patterns == {"W": {"kind": "sliding_window", "window": 8}}


def test_errors_of_other_programs_name_their_settings() -> None:
    register_needle()
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(HydraException) as error:
        compose("needle", overrides=["chekpoint=runs/a"])
    line = explain(error.value, ["chekpoint=runs/a"], config_groups(CONF), NeedleConfig)
    assert line.startswith("chekpoint=runs/a: no such setting. Did you mean checkpoint?")


def rejected(program: str, *arguments: str, processes: int = 0) -> Outcome:
    outcome = run(program, *arguments, processes=processes)
    assert outcome.status != 0
    assert "Traceback" not in outcome.out
    return outcome


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["model=7b_hybird"], "+model=7b_hybrid"),
        (["+model=7b_hybird"], "+model=7b_hybrid"),
        (["model=7b_hybrid"], "Write +model=7b_hybrid"),
        (["+model=7b_hybrid", "-plan"], "settings have no dashes. Write plan=VALUE."),
        (["+model=7b_hybrid", "--train.steps=5"], "settings have no dashes. Write train.steps=5."),
        (["+model=7b_hybrid", "layout.pattern.kind=locl_vertical"], "local_vertical"),
        (["model=[]"], "error: model=[]: names no file. Write +model=NAME. There are 125m_dense"),
        (
            ["+model=[7b_hybrid,1b_dense]"],
            "error: +model=[7b_hybrid,1b_dense]: would merge several files. Write one, or",
        ),
        (["+model=7b_hybrid", "data=null"], "error: data=null: names no file. Write data=NAME. There are bundled"),
        (["-m", "+model=7b_hybrid", "layout=dense,null"], "error: layout=dense,null: names no file."),
        (["model.num_layers=2"], "error: +model=(not set): no model is set. Add +model=NAME"),
        (["-m", "+model=7b_hybrid", "seed=range(1,3),a"], "error: seed=range(1,3),a: mixes a function and values."),
        (["-m", "+model=7b_hybrid", "seed=range(3,1)"], "error: seed=range(3,1): holds no value."),
        (["-m", "+model=7b_hybrid", "seed=interval(1,3)"], "such as seed=A,B, or use hydra/sweeper=optuna."),
        (["+model=7b_hybrid", "layout=glob(*)"], "error: layout=glob(*): a sweep. Write one value, or add -m"),
        (
            ["+model=7b_hybrid", "hydra.sweeper.params={seed:1}"],
            "from files only. Write them as a setting's: -m SETTING=",
        ),
        (["-m", "+model=7b_hybrid", "hydra.sweeper.params.seed=1,2"], "Write them as a setting's: -m seed=1,2"),
        (["hydra/launcher=x"], "error: hydra/launcher=x: unknown name. There are s2train_local and"),
        (["model={num_layers:2}"], "error: +model=(not set): no model is set. Add +model=NAME"),
    ],
)
def test_the_program_prints_one_line_only(arguments: list[str], near: str) -> None:
    outcome = rejected("pretrain.py", *arguments)
    assert outcome.status == 2
    assert near in error_line(outcome)
    assert len(outcome.err.splitlines()) == 1


def test_the_other_programs_say_one_line_too() -> None:
    assert "tokenizer" in error_line(rejected("prepare_data.py", "tokeniser=bytes"))
    assert "checkpoint" in error_line(rejected("needle.py", "chekpoint=runs/a"))
    calibration = rejected("profile_attention.py", "data=bundled")
    assert "data=bundled: is a section of settings. Set one of data.path," in error_line(calibration)
    assert "model=7b_hybrid: no such setting" in error_line(rejected("needle.py", "+model=7b_hybrid"))


@pytest.mark.slow
def test_one_of_two_ranks_prints_the_line() -> None:
    outcome = rejected("pretrain.py", "+model=7b_hybrid", "schedule=shiftd", processes=2)
    assert "schedule=shifted" in error_line(outcome)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("-m", "error: -m=multirun: launch/pretrain.py alone runs sweeps"),
        ("hydra.mode=MULTIRUN", "error: hydra.mode=MULTIRUN: launch/pretrain.py alone runs sweeps"),
        ("layout=dense", "error: seed=1,2: ambiguous: names several values. Name one of them, such as seed=1."),
    ],
)
def test_a_program_without_sweeps_rejects_them_and_writes_no_folder(argument: str, words: str, tmp_path: Path) -> None:
    outcome = run("show_layout.py", argument, "+model=tiny_hybrid", "seed=1,2", processes=0, cwd=tmp_path)
    assert outcome.status == 2
    assert error_line(outcome).startswith(words)
    assert list(tmp_path.iterdir()) == []
