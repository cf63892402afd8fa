"""Device functions that the kernels of block statistics share."""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

import os

import triton
import triton.language as tl

from ..interpreter import repair_interpreter

if os.environ.get("TRITON_INTERPRET") == "1":
    repair_interpreter()


@triton.jit
def visible_tiles(
    first, num_keys, ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    """Return the bounds of the key tiles that a query tile sees.

    The query tile starts at position `first`. The bounds are full, stop: tiles [0, full) need no mask; [full, stop) do,
    and end with a whole block.
    """
    full = num_keys // STEPS
    blocks = (num_keys + BLOCK - 1) // BLOCK
    if CAUSAL:
        full = tl.minimum(full, (first + 1) // STEPS)
        blocks = tl.minimum(blocks, (first + ROWS - 1) // BLOCK + 1)
    return full, blocks * (BLOCK // STEPS)
