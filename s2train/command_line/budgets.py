"""Names settings in steps that may be set in tokens instead.

A command line or a file sets one of the two. `s2train.validation.token_budgets` derives steps from tokens.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from s2train.errors import ConfigError

# Setting in steps -> the same in tokens.
TOKENS_OF: Mapping[str, str] = {
    "train.steps": "train.tokens",
    "optim.warmup_steps": "optim.warmup_tokens",
    "optim.decay_steps": "optim.decay_tokens",
    "optim.wsd_decay_steps": "optim.wsd_decay_tokens",
}


def steps_given(overrides: Iterable[str]) -> frozenset[str]:
    """Return the settings of `TOKENS_OF` that a command line sets in steps."""
    pairs = (override.lstrip("+").partition("=") for override in overrides)
    return frozenset(name for name, _, value in pairs if name in TOKENS_OF and value not in ("null", "???"))


def check_file(path: str, settings: Mapping[str, Any], package: str) -> None:
    """Check that a file of settings sets each length once.

    Args:
        path: the file's, for the error.
        package: dotted name of the section that the settings belong to; empty: all of them.
    Raises:
        ConfigError: it sets one both in steps and in tokens.
    """
    path = f"{path.removesuffix('.yaml')}.yaml"
    for steps, tokens in TOKENS_OF.items():
        found = {name: _value(settings, name, package) for name in (steps, tokens)}
        if None not in found.values():
            problem = f"{path} sets {steps}={found[steps]} as well, which follows from it"
            raise ConfigError(tokens, found[tokens], problem, f"Keep one of the two in {path}.")


def _value(settings: Mapping[str, Any], name: str, package: str) -> Any:
    prefix = f"{package}." if package else ""
    if not name.startswith(prefix):
        return None
    node: Any = settings
    for part in name.removeprefix(prefix).split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node
