"""torchrun leaves no empty log folder behind, and keeps logs where the user wants them."""

from pathlib import Path

import pytest
from torch.distributed.run import parse_args

from s2train.distributed.torchrun_logs import without_log_folders


def test_log_folders_that_nobody_asked_for_are_removed() -> None:
    with without_log_folders(parse_args(["program.py"])) as (option, folder):
        assert option == "--log-dir"
        (Path(folder) / "job").mkdir()
    assert not Path(folder).exists()


@pytest.mark.parametrize("options", [["--log-dir", "logs"], ["--tee", "3"], ["-r", "1"]])
def test_logs_that_options_ask_for_are_kept(options: list[str]) -> None:
    with without_log_folders(parse_args([*options, "program.py", "--log-dir", "the program's"])) as added:
        assert added == []
