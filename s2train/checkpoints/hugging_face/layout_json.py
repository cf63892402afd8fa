"""A layout as JSON in `config.json`, which `modeling_s2.py` and `s2train.serving` read."""

import base64
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from s2train.attention.hybrid import HybridLayout
from s2train.layouts.patterns import Dense, Pattern
from s2train.layouts.patterns.dilated import Dilated
from s2train.layouts.patterns.file import MaskPattern
from s2train.layouts.patterns.local_vertical import LocalVertical, ReferenceVertical
from s2train.layouts.patterns.ranges import Ranges
from s2train.layouts.patterns.span import Span
from s2train.layouts.patterns.window import GlobalBlocks, SlidingWindow

FORMAT = 1  # of the layout; exports without a number have this one
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
        "format": FORMAT,
        "block_size": hybrid.block_size,
        "patterns": [pattern_json(pattern) for pattern in patterns],
        "layers": [[patterns.index(head) for head in layer.heads] for layer in hybrid.layers],
    }


def pattern_json(pattern: Pattern) -> dict[str, Any]:
    """Return a pattern's kind and fields, as reading them from JSON would.

    Raises:
        NotImplementedError: modeling_s2.py does not support the pattern.
    """
    if isinstance(pattern, MaskPattern):
        bits = base64.b64encode(pattern.bits.cpu().numpy().tobytes()).decode()
        return {"kind": "mask", "num_blocks": pattern.num_blocks, "bits": bits}
    if type(pattern) not in _KINDS:
        raise NotImplementedError(f"no export of {type(pattern).__name__} yet: add it here and to modeling_s2.py")
    values = {field.name: _lists(getattr(pattern, field.name)) for field in fields(pattern)}  # type: ignore[arg-type]
    return {"kind": _KINDS[type(pattern)]} | values


def pattern_from_json(data: Mapping[str, Any]) -> Pattern:
    """Return the pattern that `pattern_json` described.

    A reference pattern comes back as the local_vertical pattern that keeps the same blocks.

    Raises:
        KeyError: this version does not know the kind.
    """
    if data["kind"] == "mask":
        packed = np.frombuffer(base64.b64decode(data["bits"]), dtype=np.uint8).reshape(data["num_blocks"], -1)
        mask = np.unpackbits(packed, axis=1, count=data["num_blocks"], bitorder="little").astype(bool)
        return MaskPattern.of(mask, "config.json", "layout")
    types = {name: kind for kind, name in _KINDS.items() if kind is not ReferenceVertical}
    return types[data["kind"]](**{name: _tuples(value) for name, value in data.items() if name != "kind"})


def _lists(value: Any) -> Any:
    return list(map(_lists, value)) if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
