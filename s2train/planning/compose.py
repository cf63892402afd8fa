"""Composes the settings of a training run without Hydra's main program."""

from collections.abc import Sequence

from hydra import compose, initialize_config_dir

from s2train.command_line.composition import CONF, config_groups, hydra_arguments
from s2train.config import PretrainConfig, register
from s2train.planning.checks import resolve


def compose_run(overrides: Sequence[str]) -> PretrainConfig:
    """Compose the settings of `launch/pretrain.py` from overrides such as ``+model=7b_hybrid``.

    Checks no values.

    Raises:
        ConfigError: no model is set, a setting has no value, or it is given by an old name and the current one, or in
            steps and in tokens.
        hydra.errors.HydraException: the overrides don't compose.
    """
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        arguments = hydra_arguments(overrides, PretrainConfig)
        cfg = resolve(compose("pretrain", arguments), config_groups(CONF)["model"], arguments)
    assert isinstance(cfg, PretrainConfig)
    return cfg
