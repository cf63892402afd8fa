"""Write a layout as JSON for `config.json`, which `modeling_s2.py` reads."""

import base64
from dataclasses import fields
from typing import Any

from s2train.attention.hybrid import HybridLayout
from s2train.layouts.patterns import Dense, Pattern
from s2train.layouts.patterns.dilated import Dilated
from s2train.layouts.patterns.file import MaskPattern
from s2train.layouts.patterns.local_vertical import LocalVertical, ReferenceVertical
from s2train.layouts.patterns.ranges import Ranges
from s2train.layouts.patterns.span import Span
from s2train.layouts.patterns.window import GlobalBlocks, SlidingWindow

_KINDS: dict[type[Pattern], str] = {
    Dense: "dense",
    LocalVertical: "local_vertical",
    ReferenceVertical: "local_vertical",
    Ranges: "ranges",
    SlidingWindow: "sliding_window",
    GlobalBlocks: "global_blocks",
    Dilated: "dilated",
    Span: "span",
}


def layout_json(hybrid: HybridLayout) -> dict[str, Any]:
    """Return block size, distinct patterns, and each head's pattern index.

    The block size is in tokens; indices are listed by layer and query head.
    """
    patterns = list(dict.fromkeys(head for layer in hybrid.layers for head in layer.heads))
    return {
        "block_size": hybrid.block_size,
        "patterns": [pattern_json(pattern) for pattern in patterns],
        "layers": [[patterns.index(head) for head in layer.heads] for layer in hybrid.layers],
    }


def pattern_json(pattern: Pattern) -> dict[str, Any]:
    """Return a pattern's kind and fields.

    Raises:
        NotImplementedError: modeling_s2.py does not support the pattern.
    """
    if isinstance(pattern, MaskPattern):
        bits = base64.b64encode(pattern.bits.cpu().numpy().tobytes()).decode()
        return {"kind": "mask", "num_blocks": pattern.num_blocks, "bits": bits}
    if type(pattern) not in _KINDS:
        raise NotImplementedError(f"no export of {type(pattern).__name__} yet: add it here and to modeling_s2.py")
    return {"kind": _KINDS[type(pattern)]} | {field.name: getattr(pattern, field.name) for field in fields(pattern)}  # type: ignore[arg-type]
