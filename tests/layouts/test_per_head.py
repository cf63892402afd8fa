"""Layouts that name the pattern of each head in each layer."""

from typing import Any

import pytest

from s2train.attention.hybrid import HybridLayout, build_hybrid_layout
from s2train.config import LayoutConfig, PatternConfig, ScheduleConfig
from s2train.errors import ConfigError
from s2train.layouts.patterns import Dense, LocalVertical, Span

RULES = [
    {"kind": "dense"},
    {"kind": "span", "base": 2, "slope": 0.25},
    {"kind": "local_vertical", "local": 1, "stride": 4, "offset": 3},
    {"kind": "local_vertical", "local": 1, "stride": 4},
]
HEADS = [[0, 1, 2, 3], [1, 1, 3, 3]]


def layout(rules: Any = RULES, heads: Any = HEADS, placement: str = "as_is", num_heads: int = 4) -> HybridLayout:
    pattern = PatternConfig("per_head", rules=rules, heads=heads)
    schedule = ScheduleConfig(placement=placement)
    settings = LayoutConfig("S", 16, pattern)
    return build_hybrid_layout(settings, schedule, num_layers=2, num_heads=num_heads, num_query_groups=num_heads)


def test_each_head_has_the_rule_that_its_layer_names_for_it() -> None:
    first, second = layout().layers
    assert first.heads == (Dense(), Span(2, 0.25), LocalVertical(1, 4, 3), LocalVertical(1, 4, 3))
    assert second.heads == (Span(2, 0.25), Span(2, 0.25), LocalVertical(1, 4, 2), LocalVertical(1, 4, 3))


def test_a_layer_of_dense_rules_is_a_dense_layer() -> None:
    assert [layer.is_dense for layer in layout(heads=[[0] * 4, [1] * 4]).layers] == [True, False]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rules": 3}, r"rules=3: not a list of patterns"),
        ({"rules": [{"kind": "spam"}] * 4}, r"rules\[0\].kind=spam: unknown"),
        ({"rules": [{"kind": "per_head"}] * 4}, r"rules\[0\].kind=per_head: a rule within rules"),
        ({"rules": [{"kind": "span", "base": 0}] * 4}, r"rules\[0\].base=0: too small"),
        ({"rules": [{"kind": "span", "base": 1, "slope": 1.0}] * 4}, r"rules\[0\].slope=1.0: outside 0 to 1"),
        ({"heads": [0, 1]}, r"heads=\[0,1\]: not lists of indices"),
        ({"heads": [[0, 1, 2, 4], [0] * 4]}, r"heads=4: layer 0 names rule 4, and there are 4"),
        ({"heads": HEADS[:1]}, r"heads=\(1 layers\): layer 1 isn't among them"),
        ({"heads": [*HEADS, [0] * 4]}, r"heads=\(3 layers\): the model has 2 layers"),
        ({"num_heads": 8}, r"heads=\(4 heads\): layer 0 names 4 heads, and the model has 8"),
    ],
)
def test_rules_and_heads_that_cannot_be_are_rejected(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^layout.pattern.{message}"):
        layout(**changed)


def test_a_placement_that_would_move_heads_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"^schedule\.placement=balanced: would reorder the heads"):
        layout(placement="balanced")
