"""Layouts from files outside conf/: `layout=file:runs/semsa/chosen.yaml`.

Hydra takes a configuration group's values from its search path or from its store. A file that the command line names is
put into the store, under the path that Hydra will look up.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from s2train.errors import ConfigError

PREFIX = "file:"
_OVERRIDE = re.compile(r"^\+{0,2}layout=['\"]?file:(?P<path>[^'\"]*)['\"]?$")


def store_layout_files(arguments: Sequence[str]) -> None:
    """Store each file that a `layout=file:PATH` among the arguments names.

    Raises:
        ConfigError: there is no such file, or it holds no settings.
    """
    for argument in arguments:
        if match := _OVERRIDE.match(argument):
            _store(match["path"])


def _store(path: str) -> None:
    given, file = PREFIX + path, Path(path)
    remedy = "Name a file of launch/choose_layout.py, or one like those of conf/layout."
    try:
        settings = OmegaConf.load(file)
    except OSError as error:
        raise ConfigError("layout", given, f"can't be read ({error.strerror})", remedy) from error
    except (UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        problem = f"is no YAML ({str(error).splitlines()[0]})"
        raise ConfigError("layout", given, problem, remedy) from error
    if not isinstance(settings, DictConfig) or not settings:
        raise ConfigError("layout", given, "holds no settings", remedy)
    group, _, name = f"layout/{given}".rpartition("/")
    ConfigStore.instance().store(name=name.removesuffix(".yaml"), node=settings, group=group, package="layout")
