"""Launch kernels with TMA descriptors at less host cost than Triton's launcher."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

# Triton 3.6 has the field `padding`; 3.7 also has `round_f32_to_tf32`.
_DEFAULTS = {field.name: field.default for field in fields(TensorDescriptor) if field.default is not MISSING}


def descriptor(
    base: Tensor, shape: list[int], strides: list[int], block_shape: list[int], layout: NVMMASharedLayout
) -> TensorDescriptor:
    """Make a `TensorDescriptor` without its checks.

    The checks would take two thirds of the time; `fits_descriptor` has already made them.
    """
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(_DEFAULTS, base=base, shape=shape, strides=strides, block_shape=block_shape, layout=layout)
    return made


def launch(
    kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], *,
    cache: dict[Any, Any], key: Any, device: torch.device, **options: int,
) -> Any:  # fmt: skip
    """Launch `kernel[grid](*arguments, **options)` on `device` without inspecting arguments.

    Triton inspects every argument in every call, which takes 100 us. The compiled kernel is kept in `cache`, for this
    device, under `key`. Arguments with one key must look the same to the compiler: constants, dtypes, and what it
    specialises (alignment of pointers, divisibility by 16, integers that are 1).

    Returns the compiled kernel.
    """
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, arguments, cache=cache, key=key, device=device, **options)
    compiled = cache.get(key)
    if compiled is None:
        compiled = cache[key] = kernel[grid](*arguments, **options)
    elif watched():
        compiled[grid](*arguments)  # a profiler is attached
    else:
        stream = driver.active.get_current_stream(device.index)
        # None: launch metadata and hooks, which only profilers read
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
    return compiled


def watched() -> bool:
    """Return whether a profiler wants to hear of launches.

    Triton always sets chains of hooks, which are mostly empty.
    """
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter)) or bool(getattr(leave, "calls", leave))
