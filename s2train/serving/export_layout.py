"""Read the layout of an export's config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from s2train.attention.kind import LayerLayout
from s2train.attention.registry import LETTERS
from s2train.checkpoints.hugging_face.layout_json import pattern_from_json
from s2train.checkpoints.hugging_face.modeling_s2 import check_layout
from s2train.errors import ConfigError
from s2train.kernels.layout import BLOCK_SIZES
from s2train.layouts.patterns import Dense, Pattern
from s2train.layouts.patterns.file import MaskPattern


@dataclass(frozen=True)
class ExportLayout:
    """What each query head of a model keeps.

    Attributes:
        block_size: tokens of a block.
        num_kv_heads: of the whole model.
        layers: the patterns of each layer's query heads.
    """

    block_size: int
    num_kv_heads: int
    layers: tuple[tuple[Pattern, ...], ...]

    @classmethod
    def read(cls, config: Mapping[str, Any], name: str) -> "ExportLayout":
        """Read config.json's content; `name` is the model's, for errors.

        Raises:
            ConfigError: the layout is damaged, another version wrote it, or its blocks can't be served.
        """
        layout: Any = config.get("layout")
        try:
            check_layout(layout, None, config["num_attention_heads"])
            patterns = [pattern_from_json(pattern) for pattern in layout["patterns"]]
        except ValueError as error:
            remedy = "Export the checkpoint again with this version (launch/export.py)"
            raise ConfigError("model", name, f"in its config.json {error}", remedy) from error
        layers = tuple(tuple(patterns[index] for index in heads) for heads in layout["layers"])
        if (size := layout["block_size"]) not in BLOCK_SIZES:
            problem = f"its layout has blocks of {size} tokens, and kernels take {', '.join(map(str, BLOCK_SIZES))}"
            raise ConfigError("model", name, problem, "Train and export a layout with such blocks")
        return cls(size, config["num_key_value_heads"], layers)

    def is_dense(self, layer: int) -> bool:
        """Return whether every head of a layer keeps every key."""
        return all(isinstance(head, Dense) for head in self.layers[layer])

    @property
    def longest(self) -> int | None:
        """Return the maximum number of tokens of a sequence.

        Masks limit it. Without masks there is no limit, and the result is None.
        """
        masks = [head.num_blocks for heads in self.layers for head in heads if isinstance(head, MaskPattern)]
        return min(masks) * self.block_size if masks else None


def layer_layout(heads: tuple[Pattern, ...], block_size: int) -> LayerLayout:
    """Make a layer of static patterns, to build the kernels' layouts from."""
    return LayerLayout(LETTERS["S"], heads, block_size)
