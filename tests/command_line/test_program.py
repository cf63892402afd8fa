"""How programs with argparse options read a command line."""

import argparse
import shlex

import pytest

from s2train.command_line.program import settings_before_options


@pytest.mark.parametrize(
    "line",
    [
        "out --lengths 8k 32k model.vocab_size=8192 +model=tiny_hybrid",
        "out model.vocab_size=8192 +model=tiny_hybrid --lengths 8k 32k",
        "out --lengths 8k 32k --quick model.vocab_size=8192 +model=tiny_hybrid",
    ],
)
def test_settings_may_stand_after_an_option_of_several_values(line: str) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--lengths", nargs="+")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_intermixed_args(settings_before_options(shlex.split(line)))
    assert given.output == "out"
    assert given.lengths == ["8k", "32k"]
    assert given.settings == ["model.vocab_size=8192", "+model=tiny_hybrid"]


def test_values_of_options_stay_with_them() -> None:
    words = ["--case", '{"a": "b=c"}', "--output=file", "--tokens", "8", "~tracking"]
    assert settings_before_options(words) == ["~tracking", *words[:-1]]
