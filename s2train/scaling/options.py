"""Checks the options of `launch/scaling.py` before any run."""

import argparse
import math
from collections.abc import Sequence

from s2train.command_line.composition import CONF, config_groups
from s2train.command_line.program import option_name
from s2train.environment.hardware import Hardware, detect
from s2train.errors import ConfigError
from s2train.scaling.cases import SIZES
from s2train.scaling.parity import VARIANTS
from s2train.scaling.speed import known_divisions

PARTS = ("parity", "resume", "scaling", "cp_bytes", "balance", "long")
# Parts that read an option; the others are for all.
_READ_BY = {
    "parity_model": ("parity", "resume"),
    "parity_at_once": ("parity",),
    **dict.fromkeys(("models", "seq_length", "sequences", "micro_batch", "divisions"), ("scaling",)),
    "attention_length": ("parity", "cp_bytes", "balance"),
    **dict.fromkeys(("long_size", "long_lengths", "long_agreement", "long_layers", "long_seconds"), ("long",)),
}
_POSITIVE = (
    "parity_at_once", "seq_length", "sequences", "micro_batch", "attention_length", "long_lengths", "long_agreement",
    "long_layers", "long_seconds", "timeout",
)  # fmt: skip
_MOST_SECONDS = 1_000_000  # a program's limit: the operating system waits for 24 days at most
_BLOCK = 128  # the largest of attention-only measurements


def chosen_parts(given: argparse.Namespace) -> list[str]:
    """Return the parts to run: those named, else all but the longest."""
    return [name for name in PARTS if getattr(given, name)] or [name for name in PARTS if name != "long"]


def without_effect(given: argparse.Namespace, defaults: argparse.Namespace) -> str | None:
    """Say which options no chosen part reads; None if all are read."""
    parts = chosen_parts(given)
    unread = {
        option_name(name): " or ".join(map(option_name, readers))
        for name, readers in _READ_BY.items()
        if getattr(given, name) != getattr(defaults, name) and not set(readers) & set(parts)
    }
    return ", ".join(f"{option} has no effect without {readers}" for option, readers in unread.items()) or None


def check_options(given: argparse.Namespace) -> None:
    """Check the options.

    Raises:
        ConfigError: there is no division for the devices, no such model, or a number can't work.
    """
    if given.gpus not in VARIANTS:
        raise ConfigError("--gpus", given.gpus, "no divisions are known for it", f"Choose from {sorted(VARIANTS)}")
    known = config_groups(CONF)["model"]
    long = [f"{given.long_size}_{kind}" for kind in ("hybrid", "dense")]
    for option, models in (("--models", given.models), ("--parity-model", [given.parity_model]), ("--long-size", long)):
        for model in models:
            if model not in known:
                raise ConfigError(option, model, "unknown model", f"There are {', '.join(known)}")
    divisions = known_divisions(given.gpus)
    for division in given.divisions or ():
        if division not in divisions:
            problem = f"unknown division of {given.gpus} GPUs"
            raise ConfigError("--divisions", division, problem, f"There are {', '.join(divisions)}")
    for name in _POSITIVE:
        value = getattr(given, name)
        for number in value if isinstance(value, list) else [] if value is None else [value]:
            if not 0 < number < math.inf:
                raise ConfigError(option_name(name), number, "is no positive number", "Set one")
    if given.timeout > _MOST_SECONDS:
        raise ConfigError("--timeout", given.timeout, "is too large", f"Set at most {_MOST_SECONDS}")
    if given.sequences % given.micro_batch:
        problem = f"doesn't divide --sequences={given.sequences}"
        raise ConfigError("--micro-batch", given.micro_batch, problem, "Set a divisor of it")
    _check_attention_length(given.attention_length, given.gpus, chosen_parts(given))


def _check_attention_length(length: int | None, gpus: int, parts: Sequence[str]) -> None:
    if length is None:
        return
    most = max(SIZES) if "balance" in parts else gpus
    unit = 2 * most * _BLOCK
    if length % unit:
        problem = f"{most} ranks don't each hold two chunks of whole blocks of {_BLOCK} tokens"
        raise ConfigError("--attention-length", length, problem, f"Set a multiple of {unit}")


def devices(gpus: int) -> Hardware:
    """Return one of the devices, or a CPU process with its RAM.

    Raises:
        ConfigError: fewer GPUs are visible.
    """
    try:
        return detect(0, gpus)
    except ConfigError as error:
        remedy = "Set --gpus to their number, or let CUDA_VISIBLE_DEVICES name more"
        raise ConfigError("--gpus", gpus, error.problem.partition(",")[0], remedy) from error
