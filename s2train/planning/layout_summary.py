"""Summarises a layout for plans, one line per letter that isn't dense."""

from dataclasses import dataclass

from s2train.attention.hybrid import HybridLayout
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
    summaries = []
    for letter in dict.fromkeys(layer.kind.letter for layer in hybrid.layers if not layer.is_dense):
        layers = [layer for layer in hybrid.layers if layer.kind.letter == letter]
        of_layer = {layer: density(layer, seq_length) for layer in set(layers)}
        mean = sum(of_layer[layer] for layer in layers) / len(layers)
        kind = layers[0].kind
        if kind.data_dependent:
            form = f"{kind.label}, keys chosen by the data"
            summaries.append(LetterSummary(letter, form, mean, None, kind.counts_exactly))
            continue
        heads = {head for layer in of_layer for head in layer.heads}
        forms = list(dict.fromkeys(head.form() for head in layers[0].heads if not isinstance(head, Dense)))
        if dense := sum(isinstance(head, Dense) for head in layers[0].heads):
            forms.append(f"{dense} dense head{'s' if dense > 1 else ''}")
        summaries.append(
            LetterSummary(
                letter,
                "; ".join(forms),
                mean,
                all(head.kv_efficient for head in heads),
            )
        )
    return tuple(summaries)
