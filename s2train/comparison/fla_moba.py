"""Calls the MoBA of flash-linear-attention, a peer of block selection."""

from importlib.util import find_spec

import torch
from torch import Tensor


def fla_problem() -> str | None:
    """Return why flash-linear-attention's MoBA can't run here, or None."""
    missing = [name for name in ("fla", "flash_attn") if find_spec(name) is None]
    return f"not importable: {', '.join(missing)}" if missing else None


def fla_moba(query: Tensor, key: Tensor, value: Tensor, block: int, blocks: int) -> Tensor:
    """Compute MoBA attention, where each query selects its own key blocks.

    Args:
        query: [s, 1, h, d]; key, value: [s, 1, h_kv, d], repeated for the heads of a group, since FLA has no groups.
        block: tokens of a block.
        blocks: blocks that a query reads, with its own.
    Returns:
        [s, 1, h, d].
    """
    from fla.ops.moba.parallel import parallel_moba

    length, _, heads, _ = query.shape
    bounds = torch.tensor([0, length], dtype=torch.int32, device=query.device)
    wide = (x.repeat_interleave(heads // x.shape[2], 2) for x in (query, key, value))
    out: Tensor = parallel_moba(*(x.transpose(0, 1) for x in wide), bounds, length, block, blocks)
    return out.transpose(0, 1)
