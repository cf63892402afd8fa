"""Checkpoints of another megatron-core or another sort of device load, or are rejected in one line."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from s2train.checkpoints import integrity
from s2train.checkpoints.folders import load_shards
from s2train.checkpoints.random_state import set_rng
from s2train.errors import ConfigError


@pytest.fixture
def later(tmp_path: Path) -> Path:
    """A checkpoint as megatron-core 0.19 writes it: all state is in shards."""
    folder = tmp_path / "iter_0000004"
    save({"common_state/args": torch.zeros(1)}, storage_writer=FileSystemWriter(folder), no_dist=True)
    return folder


@pytest.mark.parametrize("installed", ["0.16.1", "0.18.0"])
def test_a_checkpoint_of_a_later_megatron_is_rejected_with_its_version_and_what_to_do(
    installed: str, later: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("integrity", "folders"):
        monkeypatch.setattr(f"s2train.checkpoints.{module}.installed_version", lambda _: installed)
    expected = rf"^checkpoint=.*0\.19 or later wrote it, which {installed} here .*launch/export\.py.*launch/import\.py"
    with pytest.raises(ConfigError, match=expected):
        load_shards({}, later)


def test_a_version_that_wrote_it_reads_it(later: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "installed_version", lambda _: "0.19.2")
    assert not integrity.is_of_later_megatron(later)


def test_generators_of_another_device_start_anew_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)  # as on a CPU, see s2train.megatron.cpu
    numpy_state = np.random.get_state()  # noqa: NPY002
    states = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    expected = torch.rand(3)
    gpu = torch.zeros(16, dtype=torch.uint8)
    set_rng(states | {"cuda": gpu, "tracker": {"model-parallel-rng": gpu}})
    assert torch.rand(3).equal(expected)
    assert capsys.readouterr().err.startswith("warning: the checkpoint is another device's")
