"""Block-sparse attention over per-head block layouts, on GPUs (Triton) and CPUs (torch)."""

from .attention import Backend, block_sparse_attention, resolve_backend
from .dispatch import KernelsInUse, kernels_in_use
from .layout import BLOCK_SIZES, BlockLayout
from .reference import reference_attention
from .spec import Format
from .topk_layout import Layout, TopKLayout

__all__ = [
    "BLOCK_SIZES",
    "Backend",
    "BlockLayout",
    "Format",
    "KernelsInUse",
    "Layout",
    "TopKLayout",
    "block_sparse_attention",
    "kernels_in_use",
    "reference_attention",
    "resolve_backend",
]
