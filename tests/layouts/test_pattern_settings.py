"""From `layout.pattern.*` and `layout.patterns.*` to heads, and what is rejected."""

import re
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2train.attention.coverage import coverage_report, union_coverage
from s2train.config import PatternConfig
from s2train.errors import ConfigError, as_typed
from s2train.layouts.patterns import Dense, Dilated, GlobalBlocks, LocalVertical, Pattern, Ranges, SlidingWindow, Span
from s2train.layouts.patterns.registry import PATTERNS, REQUIRED, with_defaults
from tests.layouts.layout_cases import make_hybrid, mask_of

EXAMPLES: dict[str, tuple[dict[str, Any], Pattern]] = {
    "local_vertical": ({"local": 3, "stride": 4, "sinks": 1}, LocalVertical(3, 4, 0, 1)),
    "ranges": ({"ranges": [[4, 1], [16, 2], [None, 4]]}, Ranges(((4, 1), (16, 2), (None, 4)), 0)),
    "sliding_window": ({"window": 6, "sinks": 2}, SlidingWindow(6, 2)),
    "global_blocks": ({"local": 2, "globals": [7, 0, 7]}, GlobalBlocks(2, (0, 7))),
    "dilated": ({"dilation": 4, "window": 12}, Dilated(1, 4, 0, 12)),
    "dense": ({}, Dense()),
    "span": ({"base": 2, "slope": 0.5, "sinks": 1}, Span(2, 0.5, 1)),
}


def first_head(**settings: Any) -> Pattern:
    return make_hybrid("S", num_layers=1, num_heads=4, pattern=PatternConfig(**settings)).layers[0].heads[0]


@pytest.mark.parametrize("kind", sorted(EXAMPLES))
def test_settings_make_their_pattern(kind: str) -> None:
    settings, expected = EXAMPLES[kind]
    assert first_head(kind=kind, **settings) == expected


def test_every_setting_belongs_to_a_kind_and_every_kind_has_settings_there_are() -> None:
    names = {field.name for field in fields(PatternConfig)} - {"kind"}
    assert set().union(*(kind.settings for kind in PATTERNS.values())) == names


@pytest.mark.parametrize("kind", sorted(PATTERNS))
@pytest.mark.parametrize("name", sorted({field.name for field in fields(PatternConfig)} - {"kind"}))
def test_a_setting_that_is_not_the_kinds_own_is_rejected(kind: str, name: str) -> None:
    if name in PATTERNS[kind].settings:
        return
    with pytest.raises(ConfigError, match=rf"^layout.pattern.{name}=1: .*kind={kind}.* layout.pattern.{name}=null"):
        first_head(kind=kind, **{name: 1})


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind.name, name) for kind in PATTERNS.values() for name, value in kind.settings.items() if value is REQUIRED],
)
def test_a_setting_that_its_kind_needs_is_asked_for(kind: str, name: str) -> None:
    others = {n: 1 for n, value in PATTERNS[kind].settings.items() if value is REQUIRED and n != name}
    with pytest.raises(ConfigError, match=rf"^layout.pattern.{name}=null: .*kind={kind} needs it"):
        first_head(kind=kind, **others)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, (settings, _) in EXAMPLES.items() for name in [*settings] if name != "ranges"],
)
def test_a_boolean_is_no_number(kind: str, name: str) -> None:
    settings, _ = EXAMPLES[kind]
    value = [0, True] if name == "globals" else True
    with pytest.raises(
        ConfigError, match=rf"^layout.pattern.{name}={re.escape(as_typed(value))}: a boolean instead of a"
    ):
        first_head(kind=kind, **settings | {name: value})


def test_an_unknown_kind_is_rejected_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^layout.pattern.kind=dilatd: .* Did you mean dilated\? Kinds: local_vert"):
        first_head(kind="dilatd")


def test_defaults_and_the_same_values_set_mean_the_same() -> None:
    assert with_defaults(PatternConfig()) == with_defaults(PatternConfig(local=8, stride=16, sinks=0))
    assert with_defaults(PatternConfig()) != with_defaults(PatternConfig(stride=8))


def test_a_letter_of_its_own_has_its_own_pattern_and_the_others_keep_theirs() -> None:
    dense, stripes, window = make_hybrid(
        "DSW", num_layers=3, num_heads=4, local=2, stride=4, patterns={"W": {"kind": "sliding_window", "window": 5}}
    ).layers
    assert dense.is_dense
    assert stripes.heads == tuple(LocalVertical(2, 4, offset) for offset in range(4))
    assert window.heads == (SlidingWindow(5),) * 4
    assert [layer.kind.letter for layer in (dense, stripes, window)] == ["D", "S", "W"]
    assert window.kind.core_attention == stripes.kind.core_attention


def test_a_letters_pattern_is_shifted_by_the_schedule_too() -> None:
    layers = make_hybrid(
        "SV", num_layers=2, num_heads=2, kind="rotating", stride=4, patterns={"V": {"local": 1, "stride": 8}}
    ).layers
    assert [head.describe()[-1] for layer in layers for head in layer.heads] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("letter", "given", "telling"),
    [
        ("D", {}, r"patterns.D=.*the letter of dense"),
        ("S", {}, r"patterns.S=.*the letter of s2"),
        ("w", {}, r"patterns.w=.*no capital letter"),
        ("WW", {}, r"patterns.WW=.*no capital letter"),
        ("W", 5, r"patterns.W=5: no pattern"),
        ("W", {"widow": 5}, r"patterns.W.widow=5: unknown setting. Did you mean window"),
        ("W", {"window": "wide"}, r"patterns.W.window=wide: .*Integer"),
        ("W", {"kind": "sliding_window"}, r"patterns.W.window=null: .*needs it"),
        ("W", {"kind": "sliding_window", "window": 0}, r"patterns.W.window=0: too small"),
        ("W", {"kind": "sliding", "window": 1}, r"patterns.W.kind=sliding: .*sliding_window"),
    ],
)
def test_a_letter_that_cannot_be_is_rejected_by_its_setting(letter: str, given: Any, telling: str) -> None:
    with pytest.raises(ConfigError, match=rf"^layout.{telling}"):
        make_hybrid("DS", num_layers=2, num_heads=4, patterns={letter: given})


def test_an_unknown_letter_is_rejected_with_those_that_were_declared() -> None:
    with pytest.raises(ConfigError, match=r"unknown letter X.*D \(dense\), S \(s2\), W \(sliding_window\)"):
        make_hybrid("DX", num_layers=2, num_heads=4, patterns={"W": {"kind": "sliding_window", "window": 5}})


def test_a_layer_that_keeps_everything_is_dense_attention() -> None:
    layer = make_hybrid("S", num_layers=1, num_heads=4, pattern=PatternConfig(kind="dense")).layers[0]
    assert layer.is_dense
    assert layer.kind.name == "dense"


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 24), st.integers(1, 6), st.integers(-3, 9), st.booleans())
def test_the_reference_formula_to_the_letter(
    groups: int, group_size: int, stride: int, local: int, offset: int, per_kv_head: bool
) -> None:
    pattern = PatternConfig(kind="reference", local=local, stride=stride, offset=offset, per_kv_head=per_kv_head)
    num_heads = groups * group_size
    heads = make_hybrid(
        "S", num_layers=1, num_heads=num_heads, num_query_groups=groups, kind="homogeneous", pattern=pattern
    )
    for number, head in enumerate(heads.layers[0].heads):
        h = number // group_size if per_kv_head else number
        i, j = torch.arange(40)[:, None], torch.arange(40)[None, :]
        vertical = (j + h * max(1, stride // num_heads) + offset) % stride == 0
        assert mask_of(head, 40).tril().equal(((i - j < local) | vertical).tril())


@pytest.mark.parametrize(
    ("heads", "groups", "stride", "per_kv_head", "seen"),
    [(16, 16, 24, False, 0.65), (32, 8, 16, True, 0.49), (32, 8, 8, False, 1)],  # the last is the deployed model
)
def test_the_references_blind_spots_are_found(
    heads: int, groups: int, stride: int, per_kv_head: bool, seen: float
) -> None:
    pattern = PatternConfig(kind="reference", local=8, stride=stride, per_kv_head=per_kv_head)
    hybrid = make_hybrid("S", num_layers=1, num_heads=heads, num_query_groups=groups, pattern=pattern)
    union = torch.stack([mask_of(head, 256) for head in dict.fromkeys(hybrid.layers[0].heads)]).any(0)
    distance = torch.arange(256)[:, None] - torch.arange(256)[None, :]
    assert union[distance >= 8].float().mean().item() == pytest.approx(seen, abs=0.01)
    assert coverage_report(hybrid, 256 * 16).runs[0].union.complete == (seen == 1)
    assert union_coverage(hybrid.layers[0].heads, 256).seen == int(union.sum())
