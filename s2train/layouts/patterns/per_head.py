"""Patterns that are named for each head of each layer.

`rules` lists patterns, and `heads` has a list for each of the model's layers, with one index of `rules` for each query
head. `launch/choose_layout.py` writes such layouts.
"""

from collections.abc import Callable, Sequence
from typing import Any

from s2train.errors import from_to
from s2train.layouts.patterns.base import HeadPatterns, LayerContext, Pattern, PatternError

NAME = "per_head"

# Settings and their name -> the patterns of a layer's heads, as `registry.build_patterns` makes them.
Build = Callable[[Any, str], HeadPatterns]


def per_head(rules: Any, heads: Any, build: Build) -> HeadPatterns:
    """Return heads that have the pattern named for them.

    A rule without an offset takes the schedule's offset of its head.

    Raises, some when a layer requests its heads:
        PatternError: not lists of rules and indices, or not as many as the model has layers and heads.
    """
    if not isinstance(rules, Sequence) or isinstance(rules, str) or not rules:
        raise PatternError("rules", rules, "not a list of patterns", "Write them as [{kind:dense},{kind:span,…},…].")
    example = "Write a list for each layer, with an index of rules for each query head: [[0,0,1,0],[2,1,1,0],…]."
    if not _is_rows(heads):
        raise PatternError("heads", heads, "not lists of indices", example)
    for number, row in enumerate(heads):
        if beyond := [index for index in row if not 0 <= index < len(rules)]:
            problem = f"layer {number} names rule {beyond[0]}, and there are {len(rules)}"
            raise PatternError("heads", beyond[0], problem, f"Name rule {from_to(0, len(rules) - 1)}.")

    def of_layer(layer: LayerContext) -> tuple[Pattern, ...]:
        if layer.layer >= len(heads):
            problem = f"layer {layer.layer} isn't among them"
            raise PatternError("heads", f"({len(heads)} layers)", problem, "Name the layout of this model.")
        if layer.num_layers is not None and len(heads) > layer.num_layers:
            problem = f"the model has {layer.num_layers} layers"
            raise PatternError("heads", f"({len(heads)} layers)", problem, "Name the layout of this model.")
        row = heads[layer.layer]
        if len(row) != layer.num_heads:
            problem = f"layer {layer.layer} names {len(row)} heads, and the model has {layer.num_heads}"
            raise PatternError("heads", f"({len(row)} heads)", problem, "Name the layout of this model.")
        built = {index: build(rules[index], f"{layer.setting}.rules[{index}]")(layer) for index in set(row)}
        return tuple(built[index][head] for head, index in enumerate(row))

    return of_layer


def _is_rows(given: Any) -> bool:
    def is_list(value: Any) -> bool:
        return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0

    return is_list(given) and all(is_list(row) and all(type(index) is int for index in row) for row in given)
