"""Checkpoints of another megatron-core or another sort of device load, or are rejected in one line."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.checkpoint.metadata import TensorProperties

from s2train.checkpoints import integrity
from s2train.checkpoints.random_state import set_rng
from s2train.checkpoints.shards import load_shards, readable_entries
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
    monkeypatch.setattr(integrity, "installed_version", lambda _: installed)
    expected = rf"^checkpoint=.*0\.19 or later wrote it, which {installed} here .*launch/export\.py.*launch/import\.py"
    with pytest.raises(ConfigError, match=expected):
        load_shards({}, later)


def test_a_version_that_wrote_it_reads_it(later: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "installed_version", lambda _: "0.19.2")
    assert readable_entries(later) == {"common_state/args"}


def test_a_checkpoint_of_a_later_torch_is_rejected_as_such_and_not_as_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = TensorProperties.__getstate__
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda self: (*known(self), None))
    save({"weight": torch.zeros(1)}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    (tmp_path / "config.yaml").write_text("plan: {}\n")
    for name in ("progress.json", "metadata.json"):
        (tmp_path / name).write_text("{}")
    assert integrity.damage(tmp_path) is None
    with pytest.raises(ConfigError, match=rf"a later torch wrote it, which {re.escape(torch.__version__)} here"):
        load_shards({}, tmp_path)


def test_generators_of_another_device_are_not_restored_with_a_warning(
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
