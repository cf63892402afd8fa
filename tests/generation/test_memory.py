"""Texts that no memory holds are rejected."""

import io
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from s2train.errors import ConfigError
from s2train.generation import run
from s2train.generation.config import GenerateConfig
from s2train.generation.request import read_request
from tests.generation.test_request import CPU
from tests.needles.test_request import save


def fill_memory(*_: Any, **__: Any) -> NoReturn:
    torch.empty(1 << 60)
    raise AssertionError("this machine has more memory than any")


@pytest.mark.parametrize(("prompts", "setting"), [("x", "max_tokens=9"), (["x", "y"], "batch_size=null")])
def test_texts_that_no_memory_holds_are_rejected(
    prompts: Any, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = GenerateConfig(str(save(tmp_path / "run")), prompts, max_tokens=9)
    request = read_request(cfg, 1, CPU)
    monkeypatch.setattr(run, "stream", fill_memory)
    loaded: Any = type("Loaded", (), {"model": None})
    with pytest.raises(ConfigError, match=f"^{setting}: out of memory with [12] texts of up to 10 tokens together"):
        run.generate_texts(cfg, request, loaded, torch.device("cpu"), io.StringIO())
