"""Makes all of Liger-Kernel's kernels run in Triton's interpreter."""

import importlib

import triton
import triton.language as tl


@triton.jit
def _rsqrt(x):  # type: ignore[no-untyped-def]
    return 1 / tl.sqrt(x)


def repair_liger() -> None:
    """Replace the CUDA library's reciprocal square root, which the interpreter doesn't have."""
    importlib.import_module("liger_kernel.ops.fused_add_rms_norm").rsqrt = _rsqrt  # type: ignore[attr-defined]
