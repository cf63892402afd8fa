"""The watchdog names the rank that holds up a job."""

from s2train.training.watchdog import Position, describe_hang, find_culprits


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
