"""Registry of patterns: build a layer's heads from `layout.pattern.*` settings.

To add a pattern, write one class and one entry of `PATTERNS`; its settings are fields of `PatternConfig`.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from omegaconf import OmegaConf, ValidationError

from s2train.config import PatternConfig
from s2train.errors import ConfigError
from s2train.layouts.patterns.base import HeadPatterns, LayerContext, Pattern, PatternError, scheduled
from s2train.layouts.patterns.dense import Dense
from s2train.layouts.patterns.dilated import Dilated
from s2train.layouts.patterns.file import file_heads
from s2train.layouts.patterns.local_vertical import local_vertical_heads, reference_heads
from s2train.layouts.patterns.per_head import NAME as PER_HEAD
from s2train.layouts.patterns.per_head import per_head
from s2train.layouts.patterns.ranges import Ranges
from s2train.layouts.patterns.span import Span
from s2train.layouts.patterns.window import GlobalBlocks, SlidingWindow

REQUIRED = object()


@dataclass(frozen=True)
class PatternKind:
    """A kind of pattern: its settings and heads.

    Settings have defaults or `REQUIRED`.
    """

    name: str
    settings: dict[str, Any]
    build: Callable[..., HeadPatterns]  # takes every setting by name


PATTERNS: dict[str, PatternKind] = {
    kind.name: kind
    for kind in (
        PatternKind(
            "local_vertical",
            {"local": 8, "stride": 16, "sinks": 0, "offset": None},
            local_vertical_heads,
        ),
        PatternKind(
            "ranges", {"ranges": REQUIRED, "sinks": 0}, lambda ranges, sinks: scheduled(Ranges.read(ranges, sinks))
        ),
        PatternKind(
            "sliding_window",
            {"window": REQUIRED, "sinks": 0},
            lambda window, sinks: scheduled(SlidingWindow(window, sinks)),
        ),
        PatternKind(
            "global_blocks",
            {"local": 8, "globals": REQUIRED},
            lambda local, globals: scheduled(GlobalBlocks.read(local, globals)),
        ),
        PatternKind(
            "dilated",
            {"local": 1, "dilation": REQUIRED, "window": None},
            lambda local, dilation, window: scheduled(Dilated(local, dilation, 0, window)),
        ),
        PatternKind("dense", {}, lambda: scheduled(Dense())),
        PatternKind(
            "span",
            {"base": REQUIRED, "slope": 0.0, "sinks": 0},
            lambda base, slope, sinks: scheduled(Span(base, slope, sinks)),
        ),
        PatternKind(
            "reference",
            {"local": REQUIRED, "stride": REQUIRED, "offset": 0, "per_kv_head": False},
            reference_heads,
        ),
        PatternKind("file", {"file": REQUIRED}, file_heads),
        PatternKind(
            PER_HEAD, {"rules": REQUIRED, "heads": REQUIRED}, lambda rules, heads: per_head(rules, heads, build_rule)
        ),
    )
}


def build_patterns(settings: PatternConfig, setting: str) -> HeadPatterns:
    """Build the patterns of the settings named `setting` (layout.pattern).

    Raises (as do the heads, when a layer requests them):
        ConfigError: the kind is unknown, a setting isn't the kind's or is missing, or a value is invalid.
    """
    kind = _find(settings.kind, setting)
    _check_settings(kind, settings, setting)
    filled = with_defaults(settings)
    with _named(setting):
        build = kind.build(**{name: getattr(filled, name) for name in kind.settings})

    def heads(layer: LayerContext) -> tuple[Pattern, ...]:
        with _named(setting):
            return build(layer)

    return heads


def build_rule(given: Any, setting: str) -> HeadPatterns:
    """Build the patterns of one rule of `per_head`.

    Raises:
        ConfigError: as `read_pattern` and `build_patterns`; or it is itself a list of rules.
    """
    settings = read_pattern(given, setting)
    if settings.kind == PER_HEAD:
        raise ConfigError(f"{setting}.kind", PER_HEAD, "a rule within rules", "Name another kind of pattern.")
    return build_patterns(settings, setting)


def read_pattern(given: Any, setting: str) -> PatternConfig:
    """Read pattern settings named `setting` from a mapping or a `PatternConfig`.

    Raises:
        ConfigError: not a mapping, an unknown name in it, or a value of another type.
    """
    if isinstance(given, PatternConfig):
        return given
    if not isinstance(given, Mapping):
        remedy = "Write settings, such as {kind:sliding_window,window:8}."
        raise ConfigError(setting, given, "no pattern", remedy)
    names = [field.name for field in fields(PatternConfig)]
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)[0]
            remedy = f"Did you mean {near}? Settings: {', '.join(names)}."
            raise ConfigError(f"{setting}.{name}", given[name], "unknown setting", remedy)
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PatternConfig), dict(given)))  # type: ignore[return-value]
    except ValidationError as error:
        name = (error.full_key or "").split("[")[0]
        problem = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"{setting}.{name}", given.get(name), problem, "Set a value of that type.") from error


def with_defaults(settings: PatternConfig) -> PatternConfig:
    """Fill in the kind's defaults, so that equivalent settings compare equal."""
    kind = PATTERNS.get(settings.kind)
    if kind is None:
        return settings
    defaults = {
        name: default
        for name, default in kind.settings.items()
        if default is not REQUIRED and getattr(settings, name) is None
    }
    return replace(settings, **defaults)


def _find(name: str, setting: str) -> PatternKind:
    if name not in PATTERNS:
        near = difflib.get_close_matches(name, PATTERNS, n=1, cutoff=0.0)[0]
        remedy = f"Did you mean {near}? Kinds: {', '.join(PATTERNS)}."
        raise ConfigError(f"{setting}.kind", name, "unknown", remedy)
    return PATTERNS[name]


def _check_settings(kind: PatternKind, settings: PatternConfig, setting: str) -> None:
    given = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name != "kind"}
    stray = [name for name, value in given.items() if value is not None and name not in kind.settings]
    own = ", ".join(kind.settings) or "none"
    if stray:
        nulls = " ".join(f"{setting}.{name}=null" for name in stray)
        problem = f"no setting of {setting}.kind={kind.name} (its own: {own})"
        raise ConfigError(f"{setting}.{stray[0]}", given[stray[0]], problem, f"Set {nulls}, or name another layout.")
    for name, default in kind.settings.items():
        if default is REQUIRED and given[name] is None:
            problem = f"{setting}.kind={kind.name} needs it"
            raise ConfigError(f"{setting}.{name}", "null", problem, f"Set {setting}.{name}=….")
    for name, value in given.items():
        # The command line rejects booleans; a `PatternConfig` made in Python may hold them.
        if name != "per_kv_head" and any(
            isinstance(each, bool) for each in (value if type(value) is list else [value])
        ):
            remedy = "Write numbers." if type(value) is list else "Set a number."
            raise ConfigError(f"{setting}.{name}", value, "a boolean instead of a number", remedy)


@contextmanager
def _named(setting: str) -> Iterator[None]:
    """Convert a PatternError to a ConfigError with the setting's full name."""
    try:
        yield
    except PatternError as error:
        raise ConfigError(f"{setting}.{error.setting}", error.value, error.problem, error.remedy) from error
