"""The watchdog names the rank that holds up a job."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest

from s2train.distributed.agreement import max_over_ranks
from s2train.training.watchdog import WAITING_FILES, Position, describe_hang, find_culprits
from tests.program import ROOT


def positions(*ranks: tuple[int, bool]) -> dict[int, Position]:
    """Positions of ranks, from their progress and whether they wait for others."""
    return {
        rank: Position(9, beats, f"step {beats}", f"file.py:{rank} function", waits, f"host{rank}")
        for rank, (beats, waits) in enumerate(ranks)
    }


def test_the_rank_that_is_behind_is_the_culprit() -> None:
    assert find_culprits(positions((4, True), (4, True), (3, True))) == [2]


def test_among_ranks_equally_far_the_one_that_does_not_wait_is_the_culprit() -> None:
    assert find_culprits(positions((4, True), (4, False), (4, True))) == [1]


def test_no_rank_is_named_if_all_are_at_the_same_point() -> None:
    assert find_culprits(positions((4, True), (4, True))) == []
    line = describe_hang(positions((4, True), (4, True)), [], [], 5)
    assert "all ranks are at the same point as rank 0" in line
    assert "step 4" in line


def test_the_line_names_setting_rank_position_host_and_remedy() -> None:
    line = describe_hang(positions((4, True), (4, False)), [1], [], 5)
    for words in ("train.timeout_minutes=5", "rank 1 (step 4, in file.py:1 function, on host1)", "same command"):
        assert words in line


def test_a_silent_rank_is_described_as_such_even_if_it_never_responded() -> None:
    there = positions((4, True), (4, True))
    assert "rank 1 (not responding; last seen: step 4" in describe_hang(there, [1], [1], 5)
    assert "rank 2 (never responded)" in describe_hang(there, [2], [2], 5)


# Packages that hold the files of `WAITING_FILES`; all of torch would take long to list.
PACKAGES = ("megatron.core", "torch.distributed", "torch.cuda")


def source_files() -> set[str]:
    """Paths of the files that a rank may wait in: ours, Megatron's and torch's."""
    folders = [ROOT / "s2train"]
    for name in PACKAGES:
        spec = find_spec(name)
        assert spec is not None
        folders += [Path(folder) for folder in spec.submodule_search_locations or ()]
    return {str(path) for folder in folders for path in folder.rglob("*.py")}


def without_file(ends: Iterable[str], files: set[str]) -> list[str]:
    return [end for end in ends if not any(path.endswith(f"/{end.lstrip('/')}") for path in files)]


def test_the_places_where_ranks_wait_name_files_that_exist() -> None:
    assert without_file(WAITING_FILES, source_files()) == []
    assert max_over_ranks.__code__.co_filename.endswith(WAITING_FILES)  # as a frame names it


@pytest.mark.parametrize("ours", [end for end in WAITING_FILES if end.startswith("s2train/")])
def test_a_renamed_file_is_missed_among_the_places_where_ranks_wait(ours: str) -> None:
    renamed = {path.replace(ours, ours.replace(".py", "_renamed.py")) for path in source_files()}
    assert without_file(WAITING_FILES, renamed) == [ours]
