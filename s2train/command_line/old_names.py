"""Accepts old names of settings on command lines, in YAML and checkpoints.

To rename a setting, enter its old name here; nothing else reads old names.
"""

import re
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from s2train.command_line.budgets import check_file
from s2train.command_line.file_errors import yaml_error
from s2train.command_line.messages import warn
from s2train.errors import ConfigError

# Old dotted name -> current dotted name, in the same section.
OLD_NAMES: Mapping[str, str] = {"backend": "layer_backend"}

_SWEPT = "hydra.sweeper.params."
_OVERRIDE = re.compile(
    rf"^(?P<sign>\+{{0,2}}|~)(?P<prefix>{re.escape(_SWEPT)})?(?P<name>[A-Za-z_][\w.]*)(?P<rest>=.*)?$", re.S
)


def with_current_names(arguments: Sequence[str], old_names: Mapping[str, str] = OLD_NAMES) -> list[str]:
    """Rename old settings of a command line, with one warning each.

    Raises:
        ConfigError: the command line sets a setting by its old name and by its current one.
    """
    values = {match["name"]: (match["rest"] or "=")[1:] for match in map(_OVERRIDE.match, arguments) if match}
    for old, new in old_names.items():
        if old in values and new in values:
            raise _named_twice(old, new, values[old])
        if old in values or any(_interpolation(old) in value for value in values.values()):
            warn(_renaming(old, new))
    return renamed(arguments, old_names)


def renamed(overrides: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """Rename the settings of overrides by `names`, without a warning.

    A renamed setting loses its `+`: that adds a setting, and the current name exists already.
    """

    def one(override: str) -> str:
        match = _OVERRIDE.match(override)
        if match is None:
            return override
        rest = match["rest"] or ""
        for old, new in names.items():
            rest = rest.replace(_interpolation(old), _interpolation(new))
        sign = "" if match["sign"] == "+" and match["name"] in names else match["sign"]
        return f"{sign}{match['prefix'] or ''}{names.get(match['name'], match['name'])}{rest}"

    return [one(override) for override in overrides]


def rename_saved(
    settings: MutableMapping[str, Any], package: str = "", old_names: Mapping[str, str] = OLD_NAMES
) -> list[str]:
    """Rename old settings in nested plain settings, in place.

    Args:
        package: dotted name of the section that the settings belong to; empty: all of them.
    Returns:
        one line for each renamed setting.
    Raises:
        ConfigError: a setting has its old name and its current one.
    """
    lines = []
    for old, new in old_names.items():
        section: Any = settings
        *path, name = _within(package, old)
        for part in path:
            section = section.get(part) if isinstance(section, Mapping) else None
        if not isinstance(section, MutableMapping) or name not in section:
            continue
        current = new.rpartition(".")[2]
        if current in section:
            raise _named_twice(old, new, section[name])
        section[current] = section.pop(name)
        lines.append(_renaming(old, new))
    return lines


def accept_in_files() -> None:
    """Make Hydra rename old settings in the YAML files that it loads."""
    Plugins.instance()  # registers Hydra's own source, which may be replaced only then
    # Hydra creates a source for each composition; they share the set of warnings. It identifies sources by class name.
    source = type(FileConfigSource.__name__, (_RenamingSource,), {"warned": set()})
    SourcesRegistry.instance().types[FileConfigSource.scheme()] = source


class _RenamingSource(FileConfigSource):
    """Hydra's source of YAML files, which replaces old names and warns once."""

    warned: set[str]

    def load_config(self, config_path: str) -> ConfigResult:
        try:
            loaded = super().load_config(config_path)
        except yaml.YAMLError as error:
            raise yaml_error(self.path, config_path, error) from error
        if not isinstance(loaded.config, DictConfig):
            return loaded
        given: Any = OmegaConf.to_container(loaded.config, resolve=False)
        if not isinstance(given, dict):
            return loaded
        package = _package(config_path, (loaded.header or {}).get("package"))
        settings = _with_current_interpolations(given)
        lines = [_renaming(old, new) for old, new in OLD_NAMES.items() if _interpolation(old) in str(given)]
        lines += rename_saved(settings, package)
        if not package:
            lines += _rename_swept(settings)
        check_file(config_path, settings, package)
        if lines:
            loaded.config = OmegaConf.create(settings)
        for line in lines:
            if (text := f"{config_path}: {line}") not in self.warned:
                self.warned.add(text)
                warn(text)
        return loaded


def _with_current_interpolations(node: Any) -> Any:
    """Copy nested plain settings, with current names in their interpolations.

    `${NAME}` of an old name is replaced by that of the current name.
    """
    if isinstance(node, dict):
        return {key: _with_current_interpolations(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_with_current_interpolations(value) for value in node]
    if isinstance(node, str):
        for old, new in OLD_NAMES.items():
            node = node.replace(_interpolation(old), _interpolation(new))
    return node


def _interpolation(name: str) -> str:
    return f"${{{name}}}"


def _rename_swept(settings: dict[str, Any]) -> list[str]:
    """Rename old settings among those that a sweeper varies: `hydra.sweeper.params`, in place."""
    swept: Any = settings
    for part in _SWEPT.split(".")[:-1]:
        swept = swept.get(part) if isinstance(swept, dict) else None
    lines = []
    for old, new in OLD_NAMES.items() if isinstance(swept, dict) else ():
        if old in swept:
            if new in swept:
                raise _named_twice(old, new, swept[old])
            swept[new] = swept.pop(old)
            lines.append(_renaming(old, new))
    return lines


def _package(config_path: str, header: str | None) -> str:
    """Return the section of a file's settings; empty: the whole configuration."""
    group = config_path.rpartition("/")[0].replace("/", ".")
    if header is None or header == "_group_":
        return group
    return "" if header == "_global_" else header


def _within(package: str, name: str) -> list[str]:
    """Split a dotted name below a package; [""] if it is outside."""
    if not package:
        return name.split(".")
    return name.removeprefix(f"{package}.").split(".") if name.startswith(f"{package}.") else [""]


def _renaming(old: str, new: str) -> str:
    return f"the setting {old} is now called {new}; the old name still works"


def _named_twice(old: str, new: str, value: object) -> ConfigError:
    return ConfigError(old, value, f"it is the old name of {new}, which is set as well", f"Set {new} alone")
