"""The solver chooses what trying everything would."""

import itertools

import numpy as np
import pytest

from s2train.semsa.solving import Balance, Budget, solve

pytest.importorskip("scipy", reason="the extra semsa is not installed")

LAYERS, HEADS, RULES = 2, 2, 4


def cases(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Costs, and densities at two lengths."""
    rng = np.random.default_rng(seed)
    cost = rng.lognormal(0, 2, (LAYERS, HEADS, RULES)) * 10.0 ** -rng.integers(0, 12)
    return cost, rng.random(cost.shape), rng.random(cost.shape)


def brute_force(cost: np.ndarray, budgets: list[Budget], group: int, balance: Balance | None) -> float | None:
    best = None
    for choice in itertools.product(range(RULES), repeat=LAYERS * HEADS // group):
        rules = np.array(choice).reshape(LAYERS, -1).repeat(group, 1)[..., None]
        means = [np.take_along_axis(budget.density, rules, -1).mean() for budget in budgets]
        if any(mean > budget.most for mean, budget in zip(means, budgets, strict=True)):
            continue
        if balance is not None:
            of_rank = np.take_along_axis(balance.density, rules, -1).reshape(LAYERS, balance.ranks, -1).sum(2)
            if (of_rank > (1 + balance.imbalance) * of_rank.mean(1, keepdims=True)).any():
                continue
        total = float(np.take_along_axis(cost, rules, -1).sum())
        best = total if best is None else min(best, total)
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("balanced", [False, True])
def test_the_cheapest_rules_within_two_budgets_are_found(seed: int, group: int, balanced: bool) -> None:
    cost, *densities = cases(seed)
    budgets = [Budget(density, most) for density, most in zip(densities, (0.45, 0.5), strict=True)]
    balance = Balance(densities[1], HEADS // group, 0.2) if balanced else None
    found, best = solve(cost, budgets, group=group, balance=balance), brute_force(cost, budgets, group, balance)
    assert (found is None) == (best is None)
    if found is not None:
        assert found.cost == pytest.approx(best, rel=1e-6)
        assert found.gap == pytest.approx(0, abs=1e-6)


def test_only_allowed_rules_are_chosen() -> None:
    cost, density, _ = cases(1)
    found = solve(cost, [Budget(density, 1.0)], allowed=[1, 3])
    assert found is not None
    assert set(found.rules.ravel().tolist()) <= {1, 3}


def test_budgets_that_nothing_meets_have_no_solution() -> None:
    cost, density, _ = cases(2)
    assert solve(cost, [Budget(density, float(density.min(-1).mean()) - 1e-3)]) is None


def test_a_thousand_heads_are_solved_in_seconds() -> None:
    rng = np.random.default_rng(0)
    density = np.broadcast_to(np.sort(rng.random(12)), (32, 32, 12))
    cost = rng.lognormal(0, 2, (32, 32, 1)) * (1 - density) ** 2 * rng.lognormal(0, 0.5, density.shape)
    found = solve(cost, [Budget(density, 0.25)], time_limit=30)
    assert found is not None
    assert found.gap < 1e-3
