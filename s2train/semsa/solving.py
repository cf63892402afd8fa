"""Chooses one rule for each head under budgets.

The problem is a mixed-integer linear program, solved by scipy's HiGHS.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from s2train.errors import ConfigError

INSTALL = "Install the extra: pip install -e '.[semsa]'."


@dataclass(frozen=True)
class Budget:
    """A limit on the mean share of causal positions that heads keep.

    Attributes:
        density: [layers, heads, rules], each rule's share.
        most: largest mean over all heads.
        least: smallest mean, for layouts to compare with.
    """

    density: np.ndarray
    most: float
    least: float = 0.0


@dataclass(frozen=True)
class Balance:
    """A limit on how unequally tensor parallel ranks work in a layer.

    Attributes:
        density: [layers, heads, rules], a rule's share of causal positions.
        ranks: they hold consecutive heads, equally many.
        imbalance: by how much a rank may exceed their mean.
    """

    density: np.ndarray
    ranks: int
    imbalance: float


@dataclass(frozen=True)
class Solution:
    """The rule of each head.

    Attributes:
        rules: int64 [layers, heads].
        cost: their summed cost.
        gap: by which share a better one may be cheaper; 0 if it is proven best.
    """

    rules: np.ndarray
    cost: float
    gap: float


def solve(
    cost: np.ndarray,
    budgets: Sequence[Budget],
    *,
    group: int = 1,
    allowed: Sequence[int] | None = None,
    balance: Balance | None = None,
    time_limit: float = 60.0,
) -> Solution | None:
    """Choose the rules of least summed cost that meet the budgets.

    None if no rules meet them.

    Args:
        cost: [layers, heads, rules].
        group: so many consecutive heads, such as those of a KV head, get the same rule.
        allowed: numbers of the rules to choose from; None: all.
    Raises:
        ConfigError: scipy is not installed, or the time limit passed without any solution.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array, eye_array, kron
    except ImportError as error:
        raise ConfigError("scipy", "(not installed)", "its solver chooses the rules", INSTALL) from error
    layers, heads, rules = cost.shape
    allowed = list(range(rules)) if allowed is None else list(allowed)

    def of_units(values: np.ndarray) -> np.ndarray:
        """Sum [layers, heads, rules] over the heads of each group: [units, allowed]."""
        summed: np.ndarray = values[..., allowed].reshape(layers, heads // group, group, -1).sum(2)
        return summed.reshape(-1, len(allowed))

    costs = of_units(cost)
    units = len(costs)
    one_each = kron(eye_array(units), np.ones((1, len(allowed))))
    constraints = [LinearConstraint(csr_array(one_each), 1, 1)]
    for budget in budgets:
        row = of_units(budget.density).reshape(1, -1) / (layers * heads)
        constraints.append(LinearConstraint(csr_array(row), budget.least, budget.most))
    if balance is not None and balance.ranks > 1:
        density = of_units(balance.density).reshape(layers, balance.ranks, -1)
        limit = (1 + balance.imbalance) / balance.ranks
        rows = np.zeros((layers, balance.ranks, layers, balance.ranks, density.shape[-1]))
        for layer in range(layers):
            for rank in range(balance.ranks):
                rows[layer, rank, layer] = -limit * density[layer]
                rows[layer, rank, layer, rank] += density[layer, rank]
        constraints.append(LinearConstraint(csr_array(rows.reshape(layers * balance.ranks, -1)), -np.inf, 0))
    # The solver's tolerances are absolute, and costs may be far below them.
    scale = np.abs(costs).max() or 1.0
    found = milp(
        (costs / scale).ravel(), integrality=np.ones(costs.size), bounds=Bounds(0, 1), constraints=constraints,
        options={"time_limit": time_limit, "mip_rel_gap": 0.0},
    )  # fmt: skip
    if found.x is None:
        if found.status == 1:
            problem = "passed before the solver found any layout"
            raise ConfigError("time_limit", time_limit, problem, "Set a longer one, or fewer rules.")
        return None
    chosen = found.x.reshape(units, -1).argmax(1)
    picked = np.array(allowed)[chosen].reshape(layers, heads // group).repeat(group, 1)
    total = float(np.take_along_axis(cost, picked[..., None], -1).sum())
    return Solution(picked, total, float(found.mip_gap or 0.0))
