from pathlib import Path

import numpy as np
import pytest

from s2train.study.comparison import Group, groups
from s2train.study.files import Folders
from s2train.study.guidelines import MARGIN, Verdict, combine, guidelines_section, judge, noise_of
from s2train.study.results import read_results
from s2train.study.variants import Run
from tests.study.small_results import result

SUPPORTED, NOT_SUPPORTED, NOT_DISTINGUISHABLE, NOT_MEASURED = Verdict


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path, Path("launch"))


def trained(folders: Folders, phase: str = "16k", **losses: tuple[float, ...]) -> dict[str, list[Group]]:
    """Results of variants, whose losses are given by seed."""
    for variant, own in losses.items():
        for seed, loss in enumerate(own, start=1):
            result(folders, Run(variant, phase, seed), [4.0, loss], 1.0)
    return groups(read_results(folders))


def verdicts(section: str) -> dict[str, str]:
    """Verdict by comparison."""
    rows = [[cell.strip() for cell in line.split("|")] for line in section.splitlines() if " less " in line]
    return {comparison: verdict for _, _, comparison, _, verdict, _ in rows if verdict}


def test_the_noise_is_the_largest_spread_over_seeds_of_any_kind(folders: Folders) -> None:
    [phase] = trained(folders, dense=(2.0, 2.25), hybrid=(1.0, 1.5), window=(3.0,)).values()
    assert noise_of(phase) == 0.5


def test_the_noise_is_unknown_without_several_seeds_of_two_kinds(folders: Folders) -> None:
    [phase] = trained(folders, dense=(2.0, 2.25), hybrid=(1.0,), window=(3.0,)).values()
    assert noise_of(phase) is None


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([-0.3, -0.4], SUPPORTED),
        ([0.3, 0.4], NOT_SUPPORTED),
        ([-0.3, 0.4], NOT_DISTINGUISHABLE),
        ([-0.15, -0.3], NOT_DISTINGUISHABLE),  # one is within the noise
        ([-0.3, -0.9], NOT_DISTINGUISHABLE),  # they vary by more than one of them
        ([-0.3], NOT_DISTINGUISHABLE),  # one seed needs twice the noise
        ([-0.5], SUPPORTED),
        ([0.5], NOT_SUPPORTED),
        ([], NOT_MEASURED),
    ],
)
def test_every_seeds_difference_must_exceed_the_noise(differences: list[float], verdict: Verdict) -> None:
    assert judge(differences, noise=0.2) == verdict


def test_nothing_is_judged_without_a_noise() -> None:
    assert judge([-5.0, -5.0], None) == NOT_DISTINGUISHABLE


def test_a_margin_allows_a_kind_to_be_slightly_worse() -> None:
    slightly_worse = [MARGIN / 2, MARGIN / 2]
    assert judge(slightly_worse, MARGIN / 4, MARGIN) == SUPPORTED
    assert judge(slightly_worse, MARGIN / 4) == NOT_SUPPORTED
    assert judge([3 * MARGIN] * 2, MARGIN, MARGIN) == NOT_SUPPORTED
    assert judge([3 * MARGIN] * 2, 2.5 * MARGIN, MARGIN) == NOT_DISTINGUISHABLE


@pytest.mark.parametrize("seeds", [1, 2])
def test_kinds_that_do_not_differ_are_rarely_told_apart(seeds: int) -> None:
    """Among four kinds with two seeds each, or three and one with one seed."""
    draws = np.random.default_rng().normal(size=(4000, 4, 2))
    found = []
    for losses in draws:
        noise = float(np.ptp(losses[:4] if seeds == 2 else losses[1:], axis=1).max())
        found.append(judge(list((losses[1] - losses[0])[:seeds]), noise))
    assert sum(verdict != NOT_DISTINGUISHABLE for verdict in found) < 0.1 * len(found)


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        ([SUPPORTED, SUPPORTED], SUPPORTED),
        ([SUPPORTED, NOT_DISTINGUISHABLE], NOT_DISTINGUISHABLE),
        ([SUPPORTED, NOT_MEASURED, NOT_DISTINGUISHABLE], NOT_MEASURED),
        ([SUPPORTED, NOT_MEASURED, NOT_SUPPORTED], NOT_SUPPORTED),
    ],
)
def test_a_guideline_is_supported_if_all_its_comparisons_are(parts: list[Verdict], whole: Verdict) -> None:
    assert combine(parts) == whole


def test_each_guideline_is_judged_by_runs_of_one_seed_with_the_numbers(folders: Folders) -> None:
    losses = {"dense": (2.0, 2.0625), "hybrid": (1.5, 1.5625), "homogeneous": (2.0, 2.0625), "grouped": (1.25,)}
    section = guidelines_section(trained(folders, **losses, d1s7=(1.75,), d1s15=(2.0,), sparse=(2.25,)))
    assert verdicts(section) == {
        "hybrid less homogeneous": "supported",
        "hybrid less grouped": "not supported",
        "hybrid less dense": "supported",
        "hybrid less d1s7": "supported",
        "d1s7 less d1s15": "supported",
        "d1s15 less sparse": "supported",
        "hybrid less window": "not measured: no window",
    }
    assert "Noise: 0.0625 nats" in section
    assert "| hybrid less homogeneous | -0.5000 (seed 1), -0.5000 (seed 2) |" in section
    assert "| all of these |  | supported |" in section


def test_kinds_without_a_common_seed_are_not_compared(folders: Folders) -> None:
    result(folders, Run("hybrid", seed=1), [4.0, 2.0], 1.0)
    result(folders, Run("window", seed=2), [4.0, 2.0], 1.0)
    section = guidelines_section(groups(read_results(folders)))
    assert verdicts(section)["hybrid less window"] == "not measured: no seed in common"


def test_phases_that_continue_other_runs_judge_nothing(folders: Folders) -> None:
    section = guidelines_section(trained(folders, "64k", hybrid=(2.0, 2.1), window=(3.0, 3.1)))
    assert "nothing is measured" in section
    assert verdicts(section) == {}
