"""What `s2train.kernels.hopper.tune --candidates` times."""

import pytest

tune = pytest.importorskip("s2train.kernels.hopper.tune", reason="needs Triton's Gluon")


def test_candidates_stand_between_two_runs_of_the_default() -> None:
    items = tune._candidate_items([32768])
    by_problem: dict[str, list[str]] = {}
    for item in items:
        by_problem.setdefault(item.problem, []).append(item.variant)
    for variants in by_problem.values():
        assert (variants[0], variants[-1]) == ("default", "default, again")
        assert len(variants) == len(set(variants)) > 2
    assert {variant for variants in by_problem.values() for variant in variants} == set(tune._CANDIDATES)


def test_only_candidates_differ_from_the_default() -> None:
    for item in tune._candidate_items([32768]):
        default = tune.BACKWARD_CONFIGS[item.dim]
        assert (item.backward_config == default) == item.variant.startswith("default")
