"""Derives steps from lengths that are set in tokens."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from s2train.command_line.budgets import TOKENS_OF
from s2train.config import PretrainConfig
from s2train.errors import ConfigError


@dataclass(frozen=True)
class Length:
    """A number of steps, as its user set it.

    As text: `train.steps=100`, or `train.tokens=409,600 (100 steps)`.

    Attributes:
        setting, value: what was set: steps, or tokens.
        steps: number of steps; None: not set.
        unit: tokens of a step if tokens were set, else 1.
    """

    setting: str
    value: int | None
    steps: int | None
    unit: int

    def __str__(self) -> str:
        return (
            f"{self.setting}={self.value}" if self.unit == 1 else f"{self.setting}={self.value:,} ({self.steps} steps)"
        )

    def of(self, steps: int) -> int:
        """Another number of steps, in the unit that was set."""
        return steps * self.unit


def derive_steps(cfg: PretrainConfig, in_steps: Collection[str] = ()) -> None:
    """Set the whole steps that follow from settings in tokens, rounded up.

    Args:
        in_steps: settings of `TOKENS_OF` that the command line sets in steps, and not only a model's file.
    Raises:
        ConfigError: a number of tokens is not positive, steps are set to something else, or steps have no fixed size.
    """
    tokens_per_step = step_tokens(cfg)
    for setting, name in TOKENS_OF.items():
        given = _get(cfg, name)
        if given is None:
            continue
        tokens = _whole(name, given)
        if cfg.checkpoint.new_data:
            problem = "the steps of a new phase (checkpoint.new_data=true) follow steps of another size"
            raise ConfigError(name, tokens, problem, f"Set {name}=null and {setting}, counted from the first phase on.")
        if cfg.train.rampup_batch_size is not None:
            problem = "steps of a batch ramp-up (train.rampup_batch_size) have several sizes"
            raise ConfigError(name, tokens, problem, f"Set {name}=null and {setting}.")
        if tokens_per_step <= 0:
            continue  # sizes that `check_values` rejects
        steps, set_steps = -(-tokens // tokens_per_step), _get(cfg, setting)
        if setting in in_steps and set_steps not in (None, steps):
            problem = f"{name}={tokens} is {steps} steps of {tokens_per_step:,} tokens"
            raise ConfigError(setting, set_steps, problem, f"Set one of the two: leave {setting} out, or {name}=null.")
        _set(cfg, setting, steps)
        _set(cfg, name, tokens)


def step_tokens(cfg: PretrainConfig) -> int:
    """Tokens of a step."""
    return cfg.train.global_batch_size * cfg.train.seq_length


def length(cfg: PretrainConfig, setting: str) -> Length:
    """Return one of the settings of `TOKENS_OF`, as its user set it."""
    steps, name = _get(cfg, setting), TOKENS_OF[setting]
    tokens = _get(cfg, name)
    return Length(setting, steps, steps, 1) if tokens is None else Length(name, int(tokens), steps, step_tokens(cfg))


def token_budgets(cfg: PretrainConfig) -> list[Length]:
    """List the lengths that were set in tokens."""
    return [found for found in (length(cfg, setting) for setting in TOKENS_OF) if found.unit > 1]


def _whole(name: str, tokens: float) -> int:
    least = 0 if name == TOKENS_OF["optim.warmup_steps"] else 1
    if not math.isfinite(tokens) or tokens != int(tokens) or tokens < least:
        raise ConfigError(name, tokens, "is not a number of tokens", f"Set {name}, such as 1e9, or null.")
    return int(tokens)


def _get(cfg: PretrainConfig, setting: str) -> Any:
    section, name = setting.split(".")
    return getattr(getattr(cfg, section), name)


def _set(cfg: PretrainConfig, setting: str, value: int) -> None:
    section, name = setting.split(".")
    setattr(getattr(cfg, section), name, value)
