"""Errors spell values as users write them."""

import pickle
from pathlib import Path

import pytest

from s2train.errors import ConfigError, first_line, message_line


@pytest.mark.parametrize(
    ("value", "typed"),
    [
        (None, "null"),
        (True, "true"),
        (False, "false"),
        (0, "0"),
        (1e-8, "1e-08"),
        ("none", "none"),
        (Path("runs/a"), "runs/a"),
        ([0.5, "a", None], "[0.5,a,null]"),
        (("x",), "[x]"),
        ({"kind": "dense", "mix": True, "of": [1, 2]}, "{kind:dense,mix:true,of:[1,2]}"),
    ],
)
def test_a_value_is_spelt_as_on_the_command_line(value: object, typed: str) -> None:
    error = ConfigError("a.b", value, "can't work", "Set another")
    assert str(error) == f"a.b={typed}: can't work. Set another"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert error.value is value


@pytest.mark.parametrize(
    ("error", "message", "line"),
    [
        (ValueError("\nno file\nat all"), "no file", "ValueError: no file"),
        (ValueError(" "), "ValueError", "ValueError"),
        (KeyboardInterrupt(), "KeyboardInterrupt", "KeyboardInterrupt"),
    ],
)
def test_an_error_is_described_in_a_line(error: BaseException, message: str, line: str) -> None:
    assert message_line(error) == message
    assert first_line(error) == line
