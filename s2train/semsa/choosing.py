"""Chooses a layout by a profile, and writes it.

The steps: read the settings, solve, and write the layout with its picture and figures.
"""

import shlex
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from s2train.command_line.commands import shell_setting
from s2train.command_line.layout_files import PREFIX
from s2train.config import LayoutConfig
from s2train.costs.memory import GIB
from s2train.costs.prediction import ModelCosts, model_costs
from s2train.errors import ConfigError, from_to
from s2train.files import check_output, write_json
from s2train.kernels.block_statistics.effects import SUMS
from s2train.semsa.config import ChooseLayoutConfig
from s2train.semsa.layouts import Candidates, build_layout, layout_settings, sees_everything, write_layout
from s2train.semsa.pictures import draw_choice
from s2train.semsa.profile import Profile, group_size, load_profile
from s2train.semsa.rules import is_number
from s2train.semsa.solving import Balance, Budget, Solution, solve

_TERA = 1e12


@dataclass(frozen=True)
class Choice:
    """A chosen layout, and what it is predicted to cost.

    Attributes:
        densities: [lengths], shares of causal positions.
        change: [lengths], predicted change of the loss per token in nats, by each sum of `SUMS`.
        costs: [lengths].
    """

    layout: LayoutConfig
    solution: Solution
    lengths: tuple[int, ...]
    budgets: tuple[float, ...]
    densities: tuple[float, ...]
    change: tuple[dict[str, float], ...]
    costs: tuple[ModelCosts, ...]


def choose_layout(cfg: ChooseLayoutConfig) -> Choice:
    """Choose a layout, print what it costs, and write it.

    Raises:
        ConfigError: a setting can't work, or no rules meet the budgets.
    """
    if Path(cfg.output).suffix != ".yaml":
        raise ConfigError("output", cfg.output, "is no .yaml file", "Name one, such as runs/semsa/chosen.yaml.")
    output = check_output(cfg.output, cfg.overwrite, such="runs/semsa/chosen.yaml")
    profile = load_profile(cfg.profile)
    choice = choose(cfg, profile)
    console = Console(soft_wrap=True, width=120)
    console.print(_rules_table(profile, choice), _costs_table(choice))
    gap = f"a better one may be up to {choice.solution.gap:.1%} cheaper" if choice.solution.gap > 0 else "proven best"
    console.print(f"summed cost ({cfg.cost}) {choice.solution.cost:.4g}, {gap}", highlight=False)
    if choice.layout.allow_partial_coverage:
        console.print("some far blocks are kept by no head: the layout sets allow_partial_coverage=true")
    command = shlex.join(sys.argv)
    budgets = [
        f"{budget:g} of {length:,} tokens" for budget, length in zip(choice.budgets, choice.lengths, strict=True)
    ]
    comment = [f"Chosen by SemSA for {profile.about['checkpoint']}, at density {', '.join(budgets)}:", command]
    write_layout(output, choice.layout, comment)
    hybrid = build_layout(choice.layout, profile)
    picture, figures = output.with_suffix(".png"), output.with_suffix(".json")
    draw_choice(picture, profile, hybrid, choice.lengths[-1])
    write_json(figures, _content(cfg, profile, choice, command))
    use = shell_setting("layout", f"{PREFIX}{output}")
    console.print(f"layout {output} (use it as {use})   picture {picture}   figures {figures}")
    return choice


def choose(cfg: ChooseLayoutConfig, profile: Profile) -> Choice:
    """Choose each head's rule; writes nothing.

    Raises:
        ConfigError: as `choose_layout`.
    """
    _check_solver_settings(cfg, profile)
    budget_of = _budgets(cfg, profile)
    lengths, budgets = tuple(budget_of), tuple(budget_of.values())
    model, candidates = profile.model, Candidates.of(profile)
    allowed = _allowed(cfg, profile, candidates)
    density = [candidates.density(profile.block_size, length) for length in lengths]
    for length, budget, of_rule in zip(lengths, budgets, density, strict=True):
        _check_reachable(cfg, length, budget, of_rule[..., allowed])
    blocks = [-(-length // profile.block_size) for length in lengths]
    cost = sum(profile.costs(cfg.cost, count) for count in blocks) / len(blocks)
    group = group_size(model) if cfg.whole_groups else 1
    solution = solve(
        np.asarray(cost),
        [Budget(of_rule, budget) for of_rule, budget in zip(density, budgets, strict=True)],
        group=group,
        allowed=allowed,
        balance=Balance(density[-1], cfg.tp, cfg.imbalance),
        time_limit=cfg.time_limit,
    )
    if solution is None:
        problem = f"no rules meet it together with tp={cfg.tp}, imbalance={cfg.imbalance:g}"
        raise ConfigError("density", cfg.density, problem, "Set a larger density, or a larger imbalance.")
    layout = layout_settings(candidates, solution.rules, profile.block_size)
    hybrid = build_layout(layout, profile)
    if not sees_everything(hybrid, lengths):
        layout = replace(layout, allow_partial_coverage=True)
    return Choice(
        layout,
        solution,
        lengths,
        budgets,
        tuple(float(_picked(of_rule, solution).mean()) for of_rule in density),
        tuple({name: float(_picked(profile.costs(name, count), solution).sum()) for name in SUMS} for count in blocks),
        tuple(model_costs(model, hybrid, length) for length in lengths),
    )


def _picked(values: np.ndarray, solution: Solution) -> np.ndarray:
    """Take the chosen rules' values of [layers, heads, rules]: [layers, heads]."""
    picked: np.ndarray = np.take_along_axis(values, solution.rules[..., None], -1)[..., 0]
    return picked


def _check_solver_settings(cfg: ChooseLayoutConfig, profile: Profile) -> None:
    if cfg.cost not in SUMS:
        raise ConfigError("cost", cfg.cost, "unknown", f"Set one of {', '.join(SUMS)}.")
    kv_heads = profile.model.num_query_groups
    if cfg.tp < 1 or kv_heads % cfg.tp:
        raise ConfigError("tp", cfg.tp, f"doesn't divide the {kv_heads} KV heads", "Set a divisor of them.")
    if not cfg.imbalance >= 0:
        raise ConfigError("imbalance", cfg.imbalance, "not 0 or more", "Set imbalance=0.1.")
    if not cfg.time_limit > 0:
        raise ConfigError("time_limit", cfg.time_limit, "not more than 0", "Set time_limit=60.")


def _budgets(cfg: ChooseLayoutConfig, profile: Profile) -> dict[int, float]:
    """Return the largest density by length, shortest first."""
    lengths = cfg.lengths or [profile.seq_length]
    if len(set(lengths)) < len(lengths):
        raise ConfigError("lengths", cfg.lengths, "names a length twice", "Name each once.")
    if min(lengths) < profile.block_size:
        raise ConfigError("lengths", sorted(lengths), f"below a block of {profile.block_size}", "Set longer ones.")
    if max(lengths) > profile.seq_length:
        problem = f"the profile ends at {profile.seq_length:,} tokens"
        raise ConfigError("lengths", sorted(lengths), problem, "Set shorter ones, or profile longer sequences.")
    given = cfg.density if isinstance(cfg.density, list) else [cfg.density] * len(lengths)
    if not all(is_number(value) and 0 < value <= 1 for value in given):
        raise ConfigError("density", cfg.density, "no share above 0 and up to 1", "Set density=0.25.")
    if len(given) != len(lengths):
        problem = f"{len(given)} densities for {len(lengths)} lengths"
        raise ConfigError("density", cfg.density, problem, "Set one for each of `lengths`, or one for all.")
    return {length: float(density) for length, density in sorted(zip(lengths, given, strict=True))}


def _check_reachable(cfg: ChooseLayoutConfig, length: int, budget: float, density: np.ndarray) -> None:
    """Check that some rules meet a length's budget.

    Args:
        density: [layers, heads, rules], of the allowed rules.
    """
    least = float(density.min(-1).mean())
    if least > budget:
        problem = f"at {length:,} tokens the sparsest rules keep {least:.4f}"
        enough = np.ceil(least * 100) / 100
        larger = f"density={enough:g} or more" if enough < 1 else "density=1"
        sparser = "profile sparser rules (library.spans)" if cfg.rules is None else "allow sparser rules (rules)"
        raise ConfigError("density", budget, problem, f"Set {larger}, or {sparser}.")


def _allowed(cfg: ChooseLayoutConfig, profile: Profile, candidates: Candidates) -> list[int]:
    every = range(profile.rules.shape[3])
    if cfg.rules is not None and (beyond := [number for number in cfg.rules if number not in every]):
        problem = f"the profile has no rule {beyond[0]}"
        raise ConfigError("rules", cfg.rules, problem, f"Name rule {from_to(0, len(every) - 1)}.")
    allowed = sorted(set(every if cfg.rules is None else cfg.rules))
    if cfg.kv_efficient:
        allowed = [number for number in allowed if number in candidates.kv_efficient()]
    if not allowed:
        setting, value = ("rules", cfg.rules) if cfg.rules is not None else ("kv_efficient", True)
        problem = "leaves no rule" if setting == "rules" else "no rule of the profile is KV-efficient"
        raise ConfigError(setting, value, problem, "Allow others.")
    return allowed


def _rules_table(profile: Profile, choice: Choice) -> Table:
    table = Table(title="Chosen rules", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for name, justify in (("rule", "left"), ("heads", "right"), ("density", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    counts = Counter(choice.solution.rules.ravel().tolist())
    density = Candidates.of(profile).density(profile.block_size, choice.lengths[-1]).mean((0, 1))
    for number, rule in enumerate(profile.library):
        table.add_row(f"{number}: {rule.describe()}", str(counts[number]), f"{density[number]:.3f}")
    return table


def _costs_table(choice: Choice) -> Table:
    title = "Predicted for one sequence: change of the loss per token (nats), speed-ups over dense on one H100"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    first = ("tokens", "budget", "density", "ΔL (2nd order)", "ΔL (1st)", "dropped mass")
    for name in (*first, "TFLOP", "KV GiB", "KV GiB dense", "attention", "step"):
        table.add_column(name, justify="right", overflow="fold")
    for row in zip(choice.lengths, choice.budgets, choice.densities, choice.change, choice.costs, strict=True):
        length, budget, density, change, costs = row
        cache, dim = costs.cache, costs.head_dim
        table.add_row(
            f"{length:,}",
            f"{budget:g}",
            f"{density:.4f}",
            *(f"{change[name]:+.3g}" for name in ("squared", "signed")),
            f"{change['mass'] / choice.solution.rules.size:.3f}",
            f"{(costs.forward_flops + costs.backward_flops) / _TERA:.3g}",
            *(f"{cache.nbytes(count, dim) / GIB:.3g}" for count in (cache.peak, cache.dense)),
            f"{costs.attention_speedup:.2f}×",
            f"{costs.step_speedup:.2f}×",
        )
    return table


def _content(cfg: ChooseLayoutConfig, profile: Profile, choice: Choice, command: str) -> dict[str, Any]:
    return {
        "command": command,
        "settings": asdict(cfg),
        "profile": {name: value for name, value in profile.about.items() if name != "rules"},
        "rules": [rule.describe() for rule in profile.library],
        "heads": choice.solution.rules.tolist(),
        "cost": choice.solution.cost,
        "gap": choice.solution.gap,
        "lengths": [
            {
                "tokens": length,
                "budget": budget,
                "density": density,
                "change_per_token": change,
                "costs": costs.to_json(),
            }
            for length, budget, density, change, costs in zip(
                choice.lengths, choice.budgets, choice.densities, choice.change, choice.costs, strict=True
            )
        ],
    }
