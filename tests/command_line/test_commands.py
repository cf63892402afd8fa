"""What programs print to be typed is read back as it was meant."""

import shlex
import string
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from s2train.command_line.commands import hydra_setting, python_command, shell_setting
from s2train.command_line.composition import CONF, hydra_arguments
from s2train.config import PretrainConfig, register, to_object

TEXTS = [
    "runs/a", "/tmp/a b/x", "a,b", "it's", 'a"b', "a'\"b", "[x]", "{x}", "a${b}", "ends\\", "~/x", "a*?;&|<>(1)",
    "\\${b", "null", "true", "1e3", "007", " a ", "für", "a=b", "#", "file:/a b.yaml", "$HOME", "int(3)",
]  # fmt: skip


def read(*words: str) -> PretrainConfig:
    """Settings that a program composes of its arguments."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        found = to_object(compose("pretrain", hydra_arguments(["+model=tiny_dense", *words], PretrainConfig)))
    assert isinstance(found, PretrainConfig)
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_a_printed_setting_that_is_pasted_into_a_shell_has_its_value(text: str) -> None:
    command = f"printf '%s\\0' {shell_setting('run_dir', text)} {shell_setting('data.path', [0.5, text, 0.5, 'other'])}"
    words = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout.split("\0")
    cfg = read(*words[:-1])
    assert cfg.run_dir == text
    assert cfg.data.path == [0.5, text, 0.5, "other"]


@settings(max_examples=30, deadline=None)
@given(st.text(string.printable.strip() + " äß", min_size=1, max_size=8))
def test_any_text_is_a_setting(text: str) -> None:
    assert read(hydra_setting("run_dir", text)).run_dir == text


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (Path("runs/a"), "x=runs/a"),
        ("/tmp/a b", "x=/tmp/a b"),
        ("a,b", 'x="a,b"'),
        (None, "x=null"),
        (True, "x=true"),
        (["a", "b c"], "x=[a,b c]"),
    ],
)
def test_a_setting_is_quoted_only_where_it_must_be(value: object, word: str) -> None:
    assert hydra_setting("x", value) == word


def test_a_command_quotes_its_words_for_the_shell() -> None:
    command = python_command("launch/pretrain.py", hydra_setting("run_dir", "/tmp/a b"), "--root", Path("it's"))
    assert shlex.split(command) == ["python", "launch/pretrain.py", "run_dir=/tmp/a b", "--root", "it's"]
