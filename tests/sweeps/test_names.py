"""Folders of a sweep's jobs have readable, unique names."""

import random
import shlex
import string
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from s2train.command_line.overrides import quoted
from s2train.sweeps.names import folder_name, job_folder, label

OVERRIDES = ["+model=tiny_hybrid", "layout.pattern.stride=8", "seed=1"]
SWEPT = ["layout.pattern.stride", "seed"]


def test_the_name_contains_the_swept_settings() -> None:
    assert folder_name(OVERRIDES, SWEPT).startswith("stride-8__seed-1-")
    assert label(OVERRIDES, SWEPT) == "layout.pattern.stride=8 seed=1"


def test_the_order_of_overrides_makes_no_difference() -> None:
    assert folder_name(OVERRIDES[::-1], SWEPT) == folder_name(OVERRIDES, SWEPT)


@pytest.mark.parametrize("other", [["seed=2"], ["train.steps=3"], ["layout.pattern.stride=16"]])
def test_a_changed_override_gives_another_folder_swept_or_not(other: list[str]) -> None:
    assert folder_name([*OVERRIDES, *other], SWEPT) != folder_name(OVERRIDES, SWEPT)


def test_any_value_gives_a_short_name_that_shell_and_hydra_accept_unquoted() -> None:
    for _ in range(200):
        value = "".join(random.choices(string.printable + "äß中/", k=random.randrange(300)))
        name = folder_name([f"x={value}"], ["x"])
        assert len(name) <= 89
        assert shlex.quote(name) == name
        assert name[0] not in ".-"
        assert OverridesParser.create().parse_override(f"checkpoint={name}").value() == name


def test_similar_values_have_different_folders() -> None:
    assert folder_name(["x=a b"], ["x"]) != folder_name(["x=a/b"], ["x"])


def test_a_job_keeps_its_folder_when_other_settings_are_swept(tmp_path: Path) -> None:
    first = job_folder(tmp_path, OVERRIDES, ["seed"])
    assert job_folder(tmp_path, OVERRIDES, SWEPT) != first
    first.mkdir()
    assert job_folder(tmp_path, OVERRIDES, SWEPT) == first


@pytest.mark.parametrize(
    "text", ["runs/a b", "it's", "a,b=c", "back\\slash", "{x: 1}", "ends\\", "a\\'b", "two\\\\ends\\\\", "'"]
)
def test_a_quoted_value_reads_back_in_hydra(text: str) -> None:
    value = OverridesParser.create().parse_override(f"run_dir={quoted(text)}").value()
    assert value == text
