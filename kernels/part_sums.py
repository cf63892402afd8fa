"""Add the parts of a key block's dk and dv.

Several programs computed them. See `column_parts`.
"""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import spec as specs
from .column_parts import SUM_COLUMNS
from .configs import padded
from .fp_fusion import with_fp_fusion
from .tiles import store_tile, strides

_SUM_COLUMNS = tl.constexpr(SUM_COLUMNS)
_ROWS_AT_ONCE = 16


def new_parts(slots: int, sequences: int, tiles: int, rows: int, dim: int, v_dim: int, device: torch.device) -> Tensor:
    """Allocate float32 memory for the sums of `slots` parts.

    For each sequence, tile and slot it holds `rows` rows of dk, unscaled, then `rows` rows of dv.
    """
    return specs.empty((slots, sequences, tiles, rows * (dim + v_dim)), torch.float32, device)


@with_fp_fusion
@triton.jit(do_not_specialize=["sequences", "s_k"])
def s2_attention_bwd_kernel_add_parts(
    parts, sums, dk_ptr, dv_ptr, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, scale, sequences, s_k,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Add the slots of AT_ONCE keys, and store dk and dv.

    A program adds them in order.
    """
    CHUNKS: tl.constexpr = ROWS // AT_ONCE
    program = tl.program_id(0)
    chunk = program % CHUNKS
    tile = program // CHUNKS % TILES
    b = program // (CHUNKS * TILES) % sequences
    entry = sums + program // (CHUNKS * TILES) // sequences * _SUM_COLUMNS
    first_slot = tl.load(entry)
    count = tl.load(entry + 1)
    if count == 0:
        return
    key = tl.load(entry + 4) + tile * tl.load(entry + 5) + chunk * AT_ONCE
    row = tl.arange(0, AT_ONCE)
    dims = tl.arange(0, PADDED_DIM)[None, :]
    v_dims = tl.arange(0, PADDED_V_DIM)[None, :]
    dk_at = (chunk * AT_ONCE + row)[:, None] * DIM + dims
    dv_at = ROWS * DIM + (chunk * AT_ONCE + row)[:, None] * V_DIM + v_dims
    dk = tl.zeros([AT_ONCE, PADDED_DIM], tl.float32)
    dv = tl.zeros([AT_ONCE, PADDED_V_DIM], tl.float32)
    part = parts + ((first_slot.to(tl.int64) * sequences + b) * TILES + tile) * (ROWS * (DIM + V_DIM))
    for _ in range(0, count):
        dk += tl.load(part + dk_at, mask=dims < DIM, other=0.0)
        dv += tl.load(part + dv_at, mask=v_dims < V_DIM, other=0.0)
        part += sequences.to(tl.int64) * (TILES * ROWS * (DIM + V_DIM))
    kv = tl.load(entry + 2).to(tl.int64)
    b = (b + tl.load(entry + 3)).to(tl.int64)
    in_range = key + row < s_k
    dk_base = dk_ptr + b * dk_batch + kv * dk_head
    dv_base = dv_ptr + b * dv_batch + kv * dv_head
    store_tile(dk_base, key, dk_row, in_range, dk * scale, AT_ONCE, DIM, PADDED_DIM)
    store_tile(dv_base, key, dv_row, in_range, dv, AT_ONCE, V_DIM, PADDED_V_DIM)


def launch_of_sums(
    parts: Tensor, sums: Tensor, dk: Tensor, dv: Tensor, scale: float, rows: int
) -> tuple[int, tuple[object, ...]]:
    """Return the number of programs, and arguments.

    `dk` and `dv` are views [b, h, s, d]; `parts` is as `new_parts` made it, with tiles of `rows` keys.
    """
    _, sequences, tiles, _ = parts.shape
    (dim, v_dim), at_once = (dk.shape[3], dv.shape[3]), min(rows, _ROWS_AT_ONCE)
    arguments = (
        parts, sums, dk, dv, *strides(dk), *strides(dv), float(scale), sequences, dk.shape[2],
        dim, v_dim, padded(dim), padded(v_dim), tiles, rows, at_once,
    )  # fmt: skip
    return len(sums) * sequences * tiles * (rows // at_once), arguments
