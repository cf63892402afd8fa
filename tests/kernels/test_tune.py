"""What `s2train.kernels.hopper.tune --candidates` times."""

from dataclasses import asdict

import pytest
import torch
from s2train.kernels import BlockLayout
from s2train.kernels.spec import AttentionSpec

tune = pytest.importorskip("s2train.kernels.hopper.tune", reason="needs Triton's Gluon")
SPEC = AttentionSpec(1.0, True, 0, None, "sbhd")


def configs(length: int) -> dict[str, dict[str, object]]:
    """Each problem's settings by variant, in the order in which they are timed."""
    found: dict[str, dict[str, object]] = {}
    for item in tune._candidate_items([length]):
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


def test_candidates_for_the_forward_change_only_what_they_name() -> None:
    problems: dict[str, dict[str, dict[str, object]]] = {}
    for item in tune._forward_candidate_items([32768]):
        problems.setdefault(item.problem, {})[item.variant] = asdict(item.config)
    assert set(problems) == {f"forward 32k B=128{rest}" for rest in ("", " 32/8", " d 64", " 32/8 d 64")}
    for variants in problems.values():
        plain = variants.pop("plain")
        assert variants.pop("plain, again") == plain
        assert len(variants) > 3
        for name, config in variants.items():
            changed = {setting for setting, value in config.items() if value != plain[setting]}
            short = {"short_chains": "short", "lazy": "lazy", "turns": config["turns"], "tile_programs": "tiles"}
            assert {short[setting] for setting in changed} == set(name.replace(" chains", "").split(", "))


def test_a_candidate_is_compared_with_plain_settings_of_its_problem() -> None:
    rows = [
        {"error": "no memory"},
        {"problem": "a", "variant": "plain", "ms": 3.0},
        {"problem": "b", "variant": "plain", "ms": 5.0},
        {"problem": "a", "variant": "lazy", "ms": 2.0},
    ]
    assert tune._over_plain(rows) == {"over_plain": 1.5}
    assert tune._over_plain([*rows, {"problem": "c", "variant": "lazy", "ms": 2.0}]) == {}
    assert tune._over_plain([*rows, {"variant": "lazy", "error": "no memory"}]) == {}
