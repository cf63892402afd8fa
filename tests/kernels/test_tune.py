"""What `s2train.kernels.hopper.tune --candidates` times."""

import pytest
import torch
from s2train.kernels import BlockLayout
from s2train.kernels.spec import AttentionSpec

tune = pytest.importorskip("s2train.kernels.hopper.tune", reason="needs Triton's Gluon")
SPEC = AttentionSpec(1.0, True, 0, None, "sbhd")


def configs(length: int) -> dict[str, dict[str, object]]:
    """Each problem's settings by variant, in the order in which they are timed."""
    found: dict[str, dict[str, object]] = {}
    for item in tune.candidate_items([length]):
        layout = BlockLayout.from_mask(torch.ones(32, 1, 1) > 0, item.block)
        found.setdefault(item.problem, {})[item.variant] = item.backward_config(layout, length, SPEC)
    return found


def test_candidates_stand_between_two_runs_of_plain_settings() -> None:
    problems = configs(32768)
    for variants in problems.values():
        names = list(variants)
        assert (names[0], names[-2:]) == ("plain", ["chosen", "plain, again"])
        assert len(names) > 3
    assert {variant for variants in problems.values() for variant in variants} == set(tune._CANDIDATES)


def test_only_candidates_differ_from_plain_settings() -> None:
    for variants in configs(32768).values():
        for name, config in variants.items():
            assert (config == variants["plain"]) == name.startswith("plain") or name == "chosen"


@pytest.mark.parametrize("length", [32768, 131072])
def test_what_is_chosen_is_timed_by_its_name_too(length: int) -> None:
    for variants in configs(length).values():
        assert variants["chosen"] in [config for name, config in variants.items() if name != "chosen"]


def test_named_candidates_are_timed_beside_plain_settings_only() -> None:
    items = tune.candidate_items([32768, 131072], ["second pairs", "chosen"])
    assert [(item.problem, item.variant) for item in items] == [
        (f"{length} B={block} 32/8{dim}", variant)
        for length in ("32k", "128k")
        for block, dim in ((64, " d 64"), (64, ""))
        for variant in ("plain", "second pairs", "chosen")
    ]


def test_a_candidate_is_compared_with_plain_settings_of_its_problem() -> None:
    rows = [
        {"error": "no memory"},
        {"problem": "a", "variant": "plain", "ms": 3.0},
        {"problem": "b", "variant": "plain", "ms": 5.0},
        {"problem": "a", "variant": "128 queries", "ms": 2.0},
    ]
    assert tune.over_plain(rows) == {"over_plain": 1.5}
    assert tune.over_plain([*rows, {"problem": "c", "variant": "128 queries", "ms": 2.0}]) == {}
    assert tune.over_plain([*rows, {"variant": "128 queries", "error": "no memory"}]) == {}
