"""Compiles kernels with fused multiply-adds, whatever Triton's default."""

from __future__ import annotations

from typing import Any


def with_fp_fusion(kernel: Any) -> Any:
    """Let a kernel's launches fuse multiplications with additions.

    All kernels were tuned and checked so. It is Triton's default before 3.10, and 3.9 warns where a launch leaves it
    open. The environment variable that the warning names would apply to other code's kernels too.
    """

    def run(*args: Any, **options: Any) -> Any:
        return type(kernel).run(kernel, *args, **{"enable_fp_fusion": True} | options)

    kernel.run = run
    return kernel
