"""Outputs that can't be written are rejected before any work, with the setting's name."""

import os
from argparse import ArgumentTypeError
from collections.abc import Iterator
from pathlib import Path

import pytest

from s2train.errors import ConfigError
from s2train.files import check_output, check_writable, new_file, output_stem


def test_a_folder_in_which_not_even_root_can_create_files_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"^output=/proc/a/b: /proc can't be written \(.+\)\. Name another folder"):
        check_writable("output", "/proc/a/b")


def test_a_folder_below_a_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"^run_dir={tmp_path}/file/run: {tmp_path}/file is no folder"):
        check_writable("run_dir", tmp_path / "file" / "run")


def test_a_folder_that_can_be_created_is_not_created(tmp_path: Path) -> None:
    check_writable("output", tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []


def test_files_of_results_are_rejected_where_they_cannot_be_written() -> None:
    with pytest.raises(ConfigError, match=r"^OUTPUT=/proc/results\.json: /proc can't be written"):
        output_stem(Path("/proc/results.json"), "OUTPUT")
    with pytest.raises(ArgumentTypeError, match="/proc can't be written"):
        new_file("/proc/results.json")


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A folder that this process can't look into."""
    folder, user = tmp_path / "closed", os.geteuid()
    folder.mkdir()
    folder.chmod(0)
    if user == 0:
        os.seteuid(65534)  # root may look into all
    yield folder
    os.seteuid(user)
    folder.chmod(0o700)


def test_files_of_a_folder_that_cannot_be_looked_into_are_rejected_by_their_setting(closed: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^output={closed}/x/y\.json: .+ can't be written \(Permission denied\)"):
        check_output(closed / "x" / "y.json", None, "runs/y.json")
    with pytest.raises(ArgumentTypeError, match=r"can't be written \(Permission denied\)"):
        new_file(f"{closed}/y.json")
