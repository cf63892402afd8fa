"""FlashAttention-4 (PyPI `flash-attn-4`): dense causal attention by CuTe kernels.

The kernels are compiled at the first call.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import cache
from getpass import getuser
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .versions import installed_version

PACKAGE = "flash-attn-4"
INSTALL = "pip install 's2train[fa4]'"
DTYPES = (torch.bfloat16, torch.float16)
_ARCHITECTURES = (9, 10)  # major compute capabilities with a backward


@cache
def fa4_problem() -> str | None:
    """Return why FlashAttention-4 can't be imported, or None; importing takes seconds."""
    if installed_version(PACKAGE) is None:
        return "flash-attn-4 is not installed"
    # keeps its compiled kernels on disk (`fa4_cache_folder`), so that a restarted run finds them
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    try:
        import_module("flash_attn.cute")
    except Exception as error:  # its compiler's libraries raise any type of exception
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"flash-attn-4 can't be imported ({lines[0]})"
    return None


def fa4_cache_folder() -> Path:
    """Return FlashAttention-4's folder of compiled kernels; imports nothing of it."""
    default = Path(tempfile.gettempdir()) / getuser() / "flash_attention_cute_dsl_cache"
    return Path(os.environ.get("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR") or default)


def fa4_unsupported_reason(capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why FlashAttention-4 can't run here, or None.

    Checks forward and backward for this GPU, dtype and head dimension.
    """
    if capability is None:
        return "there is no CUDA device"
    if capability[0] not in _ARCHITECTURES:
        return f"compute capability {capability[0]}.{capability[1]} is not Hopper's or Blackwell's"
    if dtype not in DTYPES:
        return f"{str(dtype).removeprefix('torch.')} is neither bfloat16 nor float16"
    largest = 256 if capability[0] == 9 else 128
    if not 8 <= head_dim <= largest or head_dim % 8:
        return f"head dimension {head_dim} is not a multiple of 8 up to {largest}"
    return None


@cache
def fa4_functions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return `flash_attn_func` and `flash_attn_varlen_func`.

    Raises:
        RuntimeError: flash-attn-4 can't be imported.
    """
    if (problem := fa4_problem()) is not None:
        raise RuntimeError(f"{problem}: {INSTALL}")
    module = import_module("flash_attn.cute")
    return module.flash_attn_func, module.flash_attn_varlen_func


def fa4_attention(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, deterministic: bool, bounds: Tensor | None = None
) -> Tensor:
    """Compute causal attention of every head.

    The last query is at the last key.

    Args:
        q: [s_q, b, h, d]; k, v: [s_k, b, h_kv, d], with s_k >= s_q. Strided tensors are read in place.
        bounds: int32 [documents + 1], ascending from 0 to s_q: documents packed along one sequence (b = 1, s_q = s_k);
            each attends only to itself.
        deterministic: compute the same gradients in every run, at some cost.
    Returns:
        [s_q, b, h, d].
    """
    whole, packed = fa4_functions()
    options: dict[str, Any] = {"softmax_scale": softmax_scale, "causal": True, "deterministic": deterministic}
    if bounds is None:
        out, _ = whole(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), **options)
        return out.transpose(0, 1)
    length = q.shape[0]
    out, _ = packed(
        q.squeeze(1),
        k.squeeze(1),
        v.squeeze(1),
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=length,
        max_seqlen_k=length,
        **options,
    )
    return out.unsqueeze(1)
