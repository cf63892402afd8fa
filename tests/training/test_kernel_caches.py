"""Compiled kernels are kept between runs."""

import os
from pathlib import Path

import pytest

from s2train.training.kernel_caches import set_cache_folders

VARIABLES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "TRITON_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")


def folders() -> list[Path]:
    return [Path(os.environ[name]) for name in VARIABLES]


def test_kernels_are_cached_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert set_cache_folders() == []
    assert folders() == [tmp_path / ".triton" / "cache", tmp_path / ".cache" / "torchinductor"]
    assert all(folder.is_dir() for folder in folders())


def test_cache_folders_that_the_user_set_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, str(tmp_path / name))
    assert set_cache_folders() == []
    assert folders() == [tmp_path / name for name in VARIABLES]


def test_a_cache_folder_that_cannot_be_written_is_replaced_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.write_text("no folder")  # root may write where others may not
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    triton, inductor = set_cache_folders()
    assert f"{home}/.triton/cache (Not a directory)" in triton
    assert "Set TRITON_CACHE_DIR to" in triton
    assert "Set TORCHINDUCTOR_CACHE_DIR to" in inductor
    assert all(folder.is_relative_to(tmp_path / f"s2train_kernels_{os.getuid()}") for folder in folders())
