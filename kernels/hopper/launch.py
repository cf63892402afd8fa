"""Launches of kernels that take TMA descriptors, at less cost to the host than Triton's own."""

from __future__ import annotations

import functools
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

# Triton 3.6 has `padding`, 3.7 `round_f32_to_tf32` too.
_DEFAULTS = {field.name: field.default for field in fields(TensorDescriptor) if field.default is not MISSING}


def descriptor(
    base: Tensor, shape: list[int], strides: list[int], block_shape: list[int], layout: NVMMASharedLayout
) -> TensorDescriptor:
    """`TensorDescriptor(...)` without its checks, two thirds of its time; `fits_descriptor` has made them."""
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(_DEFAULTS, base=base, shape=shape, strides=strides, block_shape=block_shape, layout=layout)
    return made


def launch(
    kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], *,
    cache: dict[Any, Any], key: Any, device: torch.device, **options: int,
) -> None:  # fmt: skip
    """`kernel[grid](*arguments, **options)`, on `device`, past Triton's look at every argument in every call (100 us).

    The compiled kernel is kept in `cache`, of that device, under `key`: arguments of one key must not differ to the
    compiler (constants, dtypes; what is specialised: alignment of pointers, divisibility by 16, integers that are 1).
    """
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, arguments, cache=cache, key=key, device=device, **options)
        return
    compiled = cache.get(key)
    if compiled is None:
        cache[key] = kernel[grid](*arguments, **options)
    elif _watched(knobs.runtime.launch_enter_hook) or _watched(knobs.runtime.launch_exit_hook):
        compiled[grid](*arguments)  # a profiler listens
    else:
        stream = driver.active.get_current_stream(device.index)
        # None: launch metadata and hooks, which only profilers read
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _watched(hook: Any) -> bool:
    """Whether anyone listens: a chain of Triton's is always there, mostly empty."""
    return bool(getattr(hook, "calls", hook))
