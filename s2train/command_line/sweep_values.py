"""Rejects sweeps that Hydra can't run, such as seed=range(1,3),a."""

from collections.abc import Iterable

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, RangeSweep, Sweep
from hydra.errors import HydraException

from s2train.errors import ConfigError


def check_sweep_values(arguments: Iterable[str]) -> None:
    """Check the values of a sweep.

    Raises:
        ConfigError: they mix functions and values, or a range holds no value.
    """
    parser = OverridesParser.create()
    for argument in arguments:
        if "(" not in argument:
            continue
        try:
            sweep = parser.parse_override(argument).value()
        except HydraException:  # explained when Hydra rejects it
            continue
        key, _, value = argument.partition("=")
        if isinstance(sweep, ChoiceSweep) and any(isinstance(one, Sweep) for one in sweep.list):
            raise ConfigError(key, value, "mixes a function and values", f"List all values: {key}=A,B,C.")
        if isinstance(sweep, RangeSweep) and (sweep.step == 0 or not any(True for _ in sweep.range())):
            remedy = f"Write {key}=range(FIRST,STOP,STEP): without STOP, and with a STEP that leads to it."
            raise ConfigError(key, value, "holds no value", remedy)
