"""The probes check what they ask before they use a device."""

import json
from pathlib import Path
from typing import Any

import pytest

from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.probes.config import ProbesConfig
from s2train.probes.evaluate_checkpoint import Request, read_request
from tests.needles.test_request import save
from tests.probes.source_text import source

CPU = Hardware("CPU", "cpu", 1 << 30)


def read(folder: Path, content: str, **settings: Any) -> Request:
    """Read a request to a run on bytes that was trained at 512 tokens."""
    text = folder / "text.jsonl"
    text.write_text(json.dumps({"text": content}) + "\n")
    return read_request(ProbesConfig(str(save(folder / "run")), str(text), **settings), 1, CPU)


@pytest.mark.parametrize("length", [512, 1024])
def test_lengths_beyond_the_trained_one_are_warned_of(
    length: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    behind = length * 6 // 512
    assert read(tmp_path, source(1, 10 * behind, behind), lengths=[length]).completions[length]
    warning = "warning: up to 1,024 tokens; the model was trained on 512\n"
    assert capsys.readouterr().err == (warning if length > 512 else "")


def test_lengths_without_anything_to_complete_are_named_with_those_that_have(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, source(1, 60, 6), lengths=[128, 512, 2048])
    assert raised.value.given == "lengths=[128,512,2048]"
    assert "used 128 and 2,048 tokens behind" in raised.value.problem
    assert raised.value.remedy.startswith("Set lengths=[512], or a text with more or longer documents")


def test_a_text_without_identifiers_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"text\.jsonl: holds no identifier of 8 characters or more\. Set a text of"):
        read(tmp_path, "a b c " * 1000, lengths=[128])
