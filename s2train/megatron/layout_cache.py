"""Cache of block layouts on the device, shared by layers."""

import torch

from s2train.attention.kind import LayerLayout
from s2train.kernels.layout import BlockLayout

_CAPACITY = 64


class LayoutCache:
    """Device layouts, keyed by what they are built from.

    Layers with the same heads share one. Only the most recent are kept, since an evaluation may use many lengths.
    """

    def __init__(self) -> None:
        self._layouts: dict[tuple[LayerLayout, int, int, int, torch.device], BlockLayout] = {}

    def get(self, layer: LayerLayout, seq_length: int, heads: tuple[int, int], device: torch.device) -> BlockLayout:
        """Return the layout of a layer's heads [first, last) over `seq_length` tokens."""
        key = (layer, seq_length, *heads, device)
        layout = self._layouts.pop(key, None)
        if layout is None:
            layout = layer.block_layout(seq_length, heads=slice(*heads), device=device)
            if len(self._layouts) >= _CAPACITY:
                self._layouts.pop(next(iter(self._layouts)))
        self._layouts[key] = layout
        return layout
