"""Summarises a layout for plans, one line per letter that isn't dense."""

from collections.abc import Sequence
from dataclasses import dataclass

from s2train.attention.hybrid import HybridLayout
from s2train.attention.kind import LayerLayout
from s2train.costs.attention import density
from s2train.layouts.patterns import Dense


@dataclass(frozen=True)
class LetterSummary:
    """Summary of the layers of one letter, none of them dense."""

    letter: str
    form: str  # its heads' patterns, without offsets, or that the data choose
    density: float  # mean over these layers
    kv_efficient: bool | None  # all heads of these layers are; None: the data choose what is read
    is_exact: bool = True  # the density; else it is expected

    def format(self) -> str:
        """Format one line."""
        if self.kv_efficient is None:
            return f"{self.form}: {'' if self.is_exact else 'expected '}density {self.density:.4f}"
        efficiency = "KV-efficient" if self.kv_efficient else "not KV-efficient"
        return f"{self.form}: density {self.density:.4f}, {efficiency}"


def summarise(hybrid: HybridLayout, seq_length: int) -> tuple[LetterSummary, ...]:
    """Summarise the letters of layers that aren't dense, in order of appearance."""
    by_letter: dict[str, list[LayerLayout]] = {}
    for layer in hybrid.layers:
        if not layer.is_dense:
            by_letter.setdefault(layer.kind.letter, []).append(layer)
    return tuple(_summary(letter, layers, seq_length) for letter, layers in by_letter.items())


def _summary(letter: str, layers: Sequence[LayerLayout], seq_length: int) -> LetterSummary:
    of_layer = {layer: density(layer, seq_length) for layer in set(layers)}
    mean = sum(of_layer[layer] for layer in layers) / len(layers)
    kind = layers[0].kind
    if kind.data_dependent:
        return LetterSummary(letter, f"{kind.label}, keys chosen by the data", mean, None, kind.counts_exactly)
    efficient = all(head.kv_efficient for layer in of_layer for head in layer.heads)
    return LetterSummary(letter, _forms(layers[0]), mean, efficient)


def _forms(layer: LayerLayout) -> str:
    """Describe the patterns of a layer's heads; dense ones are counted."""
    forms = list(dict.fromkeys(head.form() for head in layer.heads if not isinstance(head, Dense)))
    if dense := sum(isinstance(head, Dense) for head in layer.heads):
        forms.append(f"{dense} dense head{'s' if dense > 1 else ''}")
    return "; ".join(forms)
