"""Who is named when a job comes no further."""

from s2train.training.watchdog import Place, culprits_among, verdict


def places(*ranks: tuple[int, bool]) -> dict[int, Place]:
    """Ranks by how far they have come and whether they wait for others."""
    return {
        rank: Place(9, beats, f"step {beats}", f"file.py:{rank} function", waits, f"host{rank}")
        for rank, (beats, waits) in enumerate(ranks)
    }


def test_the_rank_that_has_come_least_far_holds_up_the_others() -> None:
    assert culprits_among(places((4, True), (4, True), (3, True))) == [2]


def test_of_ranks_equally_far_the_one_that_waits_for_nobody_holds_up_the_others() -> None:
    assert culprits_among(places((4, True), (4, False), (4, True))) == [1]


def test_nobody_is_named_where_all_are_in_the_same_place() -> None:
    assert culprits_among(places((4, True), (4, True))) == []
    line = verdict(places((4, True), (4, True)), [], [], 5)
    assert "no rank stands out" in line
    assert "step 4" in line


def test_the_line_names_setting_rank_place_host_and_remedy() -> None:
    line = verdict(places((4, True), (4, False)), [1], [], 5)
    for words in ("train.timeout_minutes=5", "rank 1 (step 4, in file.py:1 function, on host1)", "same command"):
        assert words in line


def test_a_silent_rank_is_told_as_such_also_if_it_never_spoke() -> None:
    there = places((4, True), (4, True))
    assert "rank 1 (silent; last seen: step 4" in verdict(there, [1], [1], 5)
    assert "rank 2 (has never spoken)" in verdict(there, [2], [2], 5)
