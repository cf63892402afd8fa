"""Outputs that can't be written are rejected before any work, with the setting's name."""

from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from s2train.errors import ConfigError
from s2train.files import check_writable, new_file, output_stem


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
