"""What `s2train.kernels.hopper.tune --candidates` times."""

import pytest

tune = pytest.importorskip("s2train.kernels.hopper.tune", reason="needs Triton's Gluon")


@pytest.mark.parametrize("backward", [False, True])
def test_candidates_stand_between_two_runs_of_the_default(backward: bool) -> None:
    items = tune._candidate_items([32768], backward)
    by_problem: dict[str, list[str]] = {}
    for item in items:
        by_problem.setdefault(item.problem, []).append(item.variant)
    for variants in by_problem.values():
        assert (variants[0], variants[-1]) == ("default", "default, again")
        assert len(variants) == len(set(variants)) > 2
    all_candidates = tune._BACKWARD_CANDIDATES if backward else tune._CANDIDATES
    assert {variant for variants in by_problem.values() for variant in variants} == set(all_candidates)


@pytest.mark.parametrize("backward", [False, True])
def test_only_candidates_differ_from_the_default(backward: bool) -> None:
    for item in tune._candidate_items([32768], backward):
        if backward:
            config, default = item.backward_config, tune.BACKWARD_CONFIGS[item.dim]
        else:
            config, default = item.config, tune.CONFIGS[item.dim, item.block]
        assert (config == default) == item.variant.startswith("default")
