"""How programs with argparse options read a command line, and how a program reports its failure."""

import argparse
import json
import os
import runpy
import shlex
from pathlib import Path
from unittest import mock

import pytest

from s2train.command_line.program import run_command, settings_before_options, tokens
from s2train.planning import compose_run


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


def test_torchruns_error_file_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank may be killed while it writes; torchrun reads what is there, and can't restart if it is half a file."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=OSError("killed before the last step")))

    def fail() -> None:
        raise RuntimeError("connection closed by peer")

    with pytest.raises(RuntimeError):
        run_command(fail)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(RuntimeError):
        run_command(fail)
    message = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert message == "RuntimeError: connection closed by peer"


def test_settings_that_do_not_compose_within_a_program_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["+model=tiny_hybrid", "model.hiden_size=64"]
    monkeypatch.setattr("sys.argv", ["program.py", "output", "--quick", *settings])
    monkeypatch.delenv("S2TRAIN_STATUS_FILE", raising=False)
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: print(compose_run(settings)))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: model.hiden_size=64: no such setting. Did you mean model.hidden_size?")


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("s2train.inference.decode_speed", []),
        ("s2train.comparison.layout_speed", ["--output", "speed.json"]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
def test_a_model_that_a_measurement_does_not_find_is_one_line(
    module: str, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [module, "+model=7b_hybird", *options])
    monkeypatch.delenv("S2TRAIN_STATUS_FILE", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "model=7b_hybird" in line
    assert "Did you mean +model=7b_hybrid?" in line


@pytest.mark.parametrize(("text", "number"), [("8192", 8192), ("8k", 8192), ("1m", 1_048_576), ("1M", 1_048_576)])
def test_a_number_of_tokens_may_end_in_k_or_m(text: str, number: int) -> None:
    assert tokens(text) == number
