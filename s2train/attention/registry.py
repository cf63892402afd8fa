"""Kinds of attention by name, and by letter of a layer string."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from s2train.attention.block_selection import BlockSelectionKind
from s2train.attention.dense import DenseKind, DenseSettings
from s2train.attention.features import Feature
from s2train.attention.hyper import HyperKind
from s2train.attention.kind import AttentionKind
from s2train.attention.s2 import S2Kind, S2Settings
from s2train.config import LayoutConfig, PatternConfig
from s2train.errors import ConfigError
from s2train.layouts.patterns.registry import read_pattern, with_defaults

Kind = TypeVar("Kind", bound=type[AttentionKind])

KINDS: dict[str, type[AttentionKind]] = {kind.name: kind for kind in (DenseKind, S2Kind, BlockSelectionKind, HyperKind)}

# Core attentions that compute the softmax over what a layer keeps, and nothing else.
OF_PATTERNS_ALONE = frozenset({DenseKind.core_attention, S2Kind.core_attention})

# The letters that need no declaration, as a run without settings has them.
LETTERS: dict[str, AttentionKind] = {
    "D": DenseKind("D", DenseSettings(), "layout.layers"),
    "S": S2Kind("S", S2Settings(), "layout.pattern"),
}


def register(kind: Kind) -> Kind:
    """Add a kind from elsewhere, such as a test.

    It can be used as a decorator.

    Raises:
        TypeError: a class attribute is missing, or the kind lists a feature that it can't have.
        ValueError: another kind has its name.
    """
    _check_class(kind)
    if KINDS.get(kind.name, kind) is not kind:
        raise ValueError(f"{kind.__module__}.{kind.__name__}: another kind is named {kind.name}; choose another name")
    KINDS[kind.name] = kind
    return kind


def _check_class(kind: type[AttentionKind]) -> None:
    where = f"{kind.__module__}.{kind.__name__}"
    wanted = ("name", "settings_type", "core_attention", "data_dependent", "counts_exactly")
    if missing := [name for name in wanted if not hasattr(kind, name)]:
        raise TypeError(f"{where}: set the class attribute{'s' * (len(missing) > 1)} {', '.join(missing)}")
    if Feature.PICTURES in kind.features and kind.data_dependent:
        raise TypeError(f"{where}: the data choose what it reads, so leave out Feature.PICTURES")
    if Feature.EXPORT in kind.features and kind.core_attention not in OF_PATTERNS_ALONE:
        raise TypeError(f"{where}: an export holds patterns of softmax attention alone, so leave out Feature.EXPORT")


def kinds_of(layout: LayoutConfig) -> dict[str, AttentionKind]:
    """Return the kind of every letter that `layout.layers` may have.

    The letters are D and S, and those that the layout declares.

    Raises:
        ConfigError: `layout.patterns` or `layout.kinds` declares no capital letter, or one twice; an unknown kind; a
            setting that the kind hasn't, or a value of another type.
    """
    kinds = dict(LETTERS)
    kinds["S"] = S2Kind("S", S2Settings(layout.pattern), "layout.pattern")
    for letter, given in layout.patterns.items():
        setting = _declare(f"layout.patterns.{letter}", letter, given, kinds)
        kinds[letter] = S2Kind(letter, S2Settings(read_pattern(given, setting)), setting)
    for letter, given in layout.kinds.items():
        setting = _declare(f"layout.kinds.{letter}", letter, given, kinds)
        kinds[letter] = read_kind(letter, given, setting)
    return kinds


def _declare(setting: str, letter: str, given: Any, kinds: Mapping[str, AttentionKind]) -> str:
    if not re.fullmatch("[A-Z]", letter):
        raise ConfigError(setting, given, "its name is no capital letter", "Name it by one, such as W.")
    if letter in kinds:
        problem = f"{letter} is the letter of {kinds[letter].label} attention"
        raise ConfigError(setting, given, problem, f"Name it by another letter than {', '.join(kinds)}.")
    return setting


def read_kind(letter: str, given: Any, setting: str) -> AttentionKind:
    """Read a kind from the settings named `setting`.

    An example of settings is {kind: s2, pattern: {kind: sliding_window, window: 8}}.

    Raises:
        ConfigError: no mapping, no known kind, a setting that it hasn't, or a value of another type.
    """
    if not isinstance(given, Mapping) or "kind" not in given:
        remedy = f"Write {{kind:NAME,…}}; kinds: {', '.join(KINDS)}."
        raise ConfigError(setting, given, "names no kind of attention", remedy)
    name = str(given["kind"])
    if name not in KINDS:
        nearest = difflib.get_close_matches(name, KINDS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{setting}.kind", name, "unknown", f"Did you mean {nearest}? Kinds: {', '.join(KINDS)}.")
    kind = KINDS[name]
    own = {key: value for key, value in given.items() if key != "kind"}
    known = [field.name for field in fields(kind.settings_type)]
    for key, value in own.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            hint = f"Did you mean {near[0]}? Settings: {', '.join(known)}." if near else "It has none."
            raise ConfigError(f"{setting}.{key}", value, f"no setting of kind {name}", hint)
    return kind(letter, _read_settings(kind.settings_type, own, setting), setting)


def _read_settings(settings_type: type, given: Mapping[str, Any], setting: str) -> Any:
    """An instance of the settings' dataclass; nested patterns keep their own messages."""
    patterns = {
        key: read_pattern(value, f"{setting}.{key}")
        for key, value in given.items()
        if isinstance(value, Mapping | PatternConfig) and _is_pattern(settings_type, key)
    }
    merged = OmegaConf.structured(settings_type)
    for key, value in given.items():
        if key in patterns:
            continue
        if _is_pattern(settings_type, key):
            remedy = "Write it as {kind:NAME,…}, such as {kind:sliding_window,window:8}."
            raise ConfigError(f"{setting}.{key}", value, "is no pattern", remedy)
        try:
            merged = OmegaConf.merge(merged, {key: value})
        except OmegaConfBaseException as error:
            problem = str(error).splitlines()[0].rstrip(".")
            raise ConfigError(f"{setting}.{key}", value, problem, "Set a value of that type.") from error
    read = OmegaConf.to_object(merged)
    values = {field.name: getattr(read, field.name) for field in fields(settings_type)}
    return settings_type(**values | patterns)


def _is_pattern(settings_type: type, key: str) -> bool:
    return any(field.name == key and field.type in (PatternConfig, "PatternConfig") for field in fields(settings_type))


def kind_values(layout: LayoutConfig) -> dict[str, Any]:
    """Return `layout.kinds` with every default filled in.

    Settings that mean the same are then equal.
    """
    found: dict[str, Any] = {}
    for letter, given in layout.kinds.items():
        kind = read_kind(letter, given, f"layout.kinds.{letter}")
        values: dict[str, Any] = {"kind": kind.name}
        for field in fields(kind.settings_type):
            value = getattr(kind.settings, field.name)
            value = with_defaults(value) if isinstance(value, PatternConfig) else value
            values[field.name] = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        found[letter] = values
    return found
