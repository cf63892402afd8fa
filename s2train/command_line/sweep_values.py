"""Rejects sweeps that Hydra can't run, such as seed=range(1,3),a."""

from collections.abc import Iterable, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, RangeSweep, Sweep
from hydra.errors import HydraException

from s2train.errors import ConfigError

_PARAMS = "hydra.sweeper.params"


def check_no_sweep(arguments: Sequence[str]) -> None:
    """Check that a command line asks for no sweep.

    Raises:
        ConfigError: it does.
    """
    for argument in arguments:
        name, _, value = argument.lstrip("+").partition("=")
        if argument in ("-m", "--multirun") or (name == "hydra.mode" and value == "MULTIRUN"):
            remedy = "Run this program once for each value"
            raise ConfigError(name, value or "multirun", "launch/pretrain.py alone runs sweeps", remedy)


def check_sweep_values(arguments: Iterable[str]) -> None:
    """Check the values of a sweep.

    Raises:
        ConfigError: they mix functions and values, a range holds no value, or they are given to the sweeper itself.
    """
    parser = OverridesParser.create()
    for argument in arguments:
        _check_params(argument)
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


def _check_params(argument: str) -> None:
    """Reject values for the sweeper, which Hydra takes from files alone."""
    name, equals, value = argument.lstrip("+").partition("=")
    if not equals or value == "null" or not f"{name}.".startswith(f"{_PARAMS}."):
        return
    swept = name.removeprefix(_PARAMS).lstrip(".")
    remedy = f"Write them as a setting's: -m {swept or 'SETTING'}={value if swept else 'A,B,C'}"
    raise ConfigError(name, value, "Hydra reads a sweep's values there from files only", remedy)
