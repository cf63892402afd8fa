"""A program's help contains every setting with its comment."""

from dataclasses import dataclass, field

import pytest

from s2train import config
from s2train.command_line.composition import CONF, config_groups
from s2train.command_line.usage import brief_usage, meaning, usage
from s2train.needles.config import NeedleConfig
from tests.program import run


@dataclass
class Inner:
    """What lies within.

    More that is not shown.
    """

    # above, on
    # two lines
    both: int | None = None  # and behind
    mode: str = "plain"


@dataclass
class Outer:
    folder: str = config.MISSING  # where it goes
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    inner: Inner = field(default_factory=Inner)  # of the letter S


@dataclass
class More(Outer):
    last: bool = False  # of the class alone


def test_every_setting_has_its_default_and_its_comments() -> None:
    lines = [" ".join(line.split()) for line in usage("Does it.", More, {}, {}).splitlines()]
    assert lines[0] == "Does it."
    assert "folder=… (str) where it goes" in lines
    assert "sizes=[1, 2]" in lines
    assert "inner: of the letter S" in lines
    assert "inner.both=null (int) above, on two lines and behind" in lines
    assert "inner.mode=plain" in lines
    assert "last=false of the class alone" in lines


def test_what_has_no_default_is_asked_for() -> None:
    text = brief_usage("Does it.", Outer, {})
    assert "folder=…" in text
    assert "where it goes" in text
    assert "sizes" not in text


def test_a_group_is_shown_with_its_names_and_the_plus_that_it_needs() -> None:
    text = usage("", config.PretrainConfig, config_groups(CONF), {config.LocalSweepConfig: "hydra.launcher"})
    assert "  +model=NAME" in text
    assert "  schedule=NAME" in text
    assert "  hydra.launcher.n_jobs=1" in text
    assert "_target_" not in text


def test_the_meaning_of_a_setting_is_its_comment() -> None:
    assert meaning(NeedleConfig, "checkpoint").startswith("a run folder, its checkpoints folder")
    assert meaning(NeedleConfig, "nothing") == ""


def test_a_setting_within_a_section_has_a_meaning_too() -> None:
    assert meaning(config.PretrainConfig, "train.seq_length") == "tokens"


@pytest.mark.parametrize("program", ["pretrain.py", "needle.py", "prepare_data.py", "export.py", "import.py"])
def test_a_program_without_arguments_prints_its_required_settings(program: str) -> None:
    done = run(program, processes=0)
    assert done.status == 2
    assert f"launch/{program}" in done.err
    assert "Required:" in done.err
    assert "=missing" not in done.err


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_is_the_programs_own(option: str) -> None:
    done = run("pretrain.py", "+model=tiny_hybrid", option, processes=0)
    assert done.status == 0
    assert "optim.decay_style=cosine            " in done.out
    assert "powered by Hydra" not in done.out


@pytest.mark.slow
def test_of_two_ranks_one_helps() -> None:
    done = run("pretrain.py", "--help", processes=2)
    assert done.status == 0
    assert done.out.count("Settings, with their defaults") == 1
