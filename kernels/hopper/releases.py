"""Gluon names that differ between Triton 3.6 and 3.9."""

from typing import Any

from triton._C.libtriton import ir as _ir
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

# the newer name first
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@builtin
def reinterpret(memory: Any, dtype: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    """View shared memory as a tensor of another type, shape and layout."""
    view = memory.reinterpret if hasattr(memory, "reinterpret") else memory._reinterpret
    return view(dtype, shape, layout, _semantic=_semantic)


@builtin
def reduce_add(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
    """TMA reduce-add to device memory.

    Triton 3.6's tma module does not expose it.
    """
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(_ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)
