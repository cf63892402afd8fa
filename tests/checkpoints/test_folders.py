"""Checkpoints are kept and renamed as configured, and one job locks a run folder."""

import multiprocessing
import os
import shlex
from pathlib import Path

import pytest

from s2train.checkpoints.folders import find_checkpoint, read_config, write_config
from s2train.checkpoints.run_folder import free_damaged_name
from s2train.checkpoints.run_state import checkpoints_to_remove
from s2train.command_line.commands import hydra_setting
from s2train.errors import ConfigError
from s2train.files import FolderLock
from s2train.sweeps.jobs import changed_setting
from s2train.training.run_settings import write_settings
from tests.test_configs import pretrain


def folders(*steps: int) -> list[Path]:
    return [Path(f"iter_{step:07d}") for step in steps]


def test_the_last_checkpoints_and_those_at_multiples_stay() -> None:
    assert checkpoints_to_remove(folders(100, 200, 300, 400, 500), keep=2, keep_every=200) == folders(100, 300)
    assert checkpoints_to_remove(folders(100, 200, 300), keep=1, keep_every=None) == folders(100, 200)


def test_all_checkpoints_stay_by_default() -> None:
    assert checkpoints_to_remove(folders(100, 200, 300), keep=None, keep_every=None) == []
    assert checkpoints_to_remove(folders(100, 200), keep=5, keep_every=None) == []


def test_a_damaged_checkpoint_is_renamed_to_a_free_name(tmp_path: Path) -> None:
    checkpoint = tmp_path / "iter_0000003"
    names = []
    for _ in range(3):
        names.append(free_damaged_name(checkpoint).name)
        free_damaged_name(checkpoint).mkdir()
    assert names == ["damaged_iter_0000003", "damaged_iter_0000003.1", "damaged_iter_0000003.2"]


def test_an_export_named_as_a_checkpoint_is_rejected_with_the_import_as_remedy(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=rf"no checkpoint there\. Import it: .*weights={tmp_path} output="):
        find_checkpoint(tmp_path)


def test_the_import_of_a_folder_with_spaces_is_quoted_for_the_shell(tmp_path: Path) -> None:
    export = tmp_path / "my export"
    export.mkdir()
    (export / "model.safetensors").touch()
    with pytest.raises(ConfigError) as error:
        find_checkpoint(export)
    assert f"weights={export}" in shlex.split(error.value.remedy)


def attempt(path: Path, results: "multiprocessing.SimpleQueue[str]") -> None:
    try:
        FolderLock(path)
        results.put("held")
    except BlockingIOError:
        results.put("rejected")


def from_another_process(path: Path) -> str:
    context = multiprocessing.get_context("fork")
    results: multiprocessing.SimpleQueue[str] = context.SimpleQueue()
    other = context.Process(target=attempt, args=(path, results))
    other.start()
    other.join()
    return results.get()


def test_one_process_at_a_time_locks_a_folder(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "lock")
    assert from_another_process(tmp_path / "lock") == "rejected"
    lock.release()
    assert from_another_process(tmp_path / "lock") == "held"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_child_that_outlives_the_lock_holder_does_not_keep_the_lock(tmp_path: Path) -> None:
    read, write = os.pipe()
    if (holder := os.fork()) == 0:
        FolderLock(tmp_path / "lock")
        if os.fork() == 0:
            os.read(read, 1)  # lives until the test has tried the lock
        os._exit(0)
    os.waitpid(holder, 0)
    assert from_another_process(tmp_path / "lock") == "held"
    os.write(write, b"x")


@pytest.mark.parametrize("name", ["a${b}", "a${b", "\\${b}"])
def test_a_folder_whose_name_looks_like_an_interpolation_is_read_as_written(name: str, tmp_path: Path) -> None:
    cfg = pretrain("+model=tiny_hybrid", hydra_setting("run_dir", name), hydra_setting("data.path", [1, name]))
    write_config(cfg, tmp_path / "config.yaml")
    assert read_config(tmp_path) == cfg
    assert changed_setting(tmp_path, cfg) is None
    assert write_settings(cfg, tmp_path, 0, []) is None
