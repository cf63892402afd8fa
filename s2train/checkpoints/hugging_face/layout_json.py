"""A layout as `config.json` holds it; `modeling_s2.py` reads it."""

import base64
from dataclasses import fields
from typing import Any

from s2train.attention.hybrid import HybridLayout
from s2train.layouts.patterns import Dense, Pattern
from s2train.layouts.patterns.dilated import Dilated
from s2train.layouts.patterns.file import MaskPattern
from s2train.layouts.patterns.local_vertical import LocalVertical, ReferenceVertical
from s2train.layouts.patterns.ranges import Ranges
from s2train.layouts.patterns.window import GlobalBlocks, SlidingWindow

_KINDS: dict[type[Pattern], str] = {
    Dense: "dense",
    LocalVertical: "local_vertical",
    ReferenceVertical: "local_vertical",
    Ranges: "ranges",
    SlidingWindow: "sliding_window",
    GlobalBlocks: "global_blocks",
    Dilated: "dilated",
}


def layout_json(hybrid: HybridLayout) -> dict[str, Any]:
    """Tokens of a block, the different patterns, and for each layer the number of every query head's pattern."""
    patterns = list(dict.fromkeys(head for layer in hybrid.layers for head in layer.heads))
    return {
        "block_size": hybrid.block_size,
        "patterns": [pattern_json(pattern) for pattern in patterns],
        "layers": [[patterns.index(head) for head in layer.heads] for layer in hybrid.layers],
    }


def pattern_json(pattern: Pattern) -> dict[str, Any]:
    """A pattern's kind and fields.

    Raises:
        NotImplementedError: a pattern that modeling_s2.py does not know.
    """
    if isinstance(pattern, MaskPattern):
        bits = base64.b64encode(pattern.bits.cpu().numpy().tobytes()).decode()
        return {"kind": "mask", "num_blocks": pattern.num_blocks, "bits": bits}
    if type(pattern) not in _KINDS:
        raise NotImplementedError(f"no export of {type(pattern).__name__} yet: add it here and to modeling_s2.py")
    return {"kind": _KINDS[type(pattern)]} | {field.name: getattr(pattern, field.name) for field in fields(pattern)}  # type: ignore[arg-type]
