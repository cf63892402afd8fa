"""Fix Triton's interpreter, which runs the kernels without a GPU (tests)."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from .interpreter_speed import speed_up_interpreter


def repair_interpreter() -> None:
    """Make Triton's interpreter compute what a GPU does.

    Applies to Triton 3.5 to 3.9. Call it before the first kernel. It makes the interpreter faster
    (`interpreter_speed.py`), and fixes five things:

    - Integer scalars are arrays of one element, which NumPy 2.4 rejects as the bound of a `range`.
    - Float scalars are Python's, which have no method `to`.
    - bfloat16 is stored as uint16: arithmetic would be that of the bit patterns, and casts would truncate.
    - Masks computed from integers are int32, which 3.9 rejects in loads and stores.
    - Every call of a device function patches `triton.language` again, which takes a third of all time.
    """
    builder = interpreter.InterpreterBuilder
    if builder.cast_impl.__module__ == __name__:
        return
    patch_tensor, cast, dot = interpreter._patch_lang_tensor, builder.cast_impl, builder.create_dot
    patch_lang, convert = interpreter._patch_lang, interpreter._implicit_cvt
    load, store = builder.create_masked_load, builder.create_masked_store

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        types = src.dtype.scalar, dst_type.scalar
        if types == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_to_bfloat16(src.data), tl.bfloat16)
        if types == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_from_bfloat16(src.data), tl.float32)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        return dot(self, _as_float32(a), _as_float32(b), *args)

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *args: Any) -> Any:
        return load(self, ptrs, _as_bool(mask), *args)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
        return store(self, ptrs, value, _as_bool(mask), *args)

    def patch_lang_once(fn: Any) -> Any:
        if any(tl.core.is_builtin(module.load) for module in _language_modules(fn)):
            return patch_lang(fn)
        return interpreter._LangPatchScope()  # nothing to restore

    def convert_argument(arg: Any) -> Any:
        return _Float(arg) if type(arg) is float else convert(arg)

    interpreter._patch_lang_tensor, interpreter._patch_lang = patch_lang_tensor, patch_lang_once
    interpreter._implicit_cvt = convert_argument
    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store
    for name in ("create_fadd", "create_fsub", "create_fmul", "create_fdiv"):
        setattr(builder, name, _rounded_once(getattr(builder, name)))
    speed_up_interpreter()


class _Float(float):
    """A kernel's float argument."""

    def to(self, dtype: tl.dtype) -> "_Float":
        return self


def _rounded_once(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Compute an operation of bfloat16 tensors in float32, then round."""

    def compute(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.dtype.scalar != tl.bfloat16:
            return operation(self, lhs, rhs)
        found = operation(self, _as_float32(lhs), _as_float32(rhs))
        return interpreter.TensorHandle(_to_bfloat16(found.data), tl.bfloat16)

    return compute


@cache
def _language_modules(fn: Any) -> list[Any]:
    """Return the modules of `triton.language` that a function names."""
    return [value for value in fn.__globals__.values() if value is tl or value is tl.core]


def _as_bool(mask: Any) -> Any:
    return mask if mask.data.dtype == bool else interpreter.TensorHandle(mask.data.astype(bool), tl.int1)


def _as_float32(x: Any) -> Any:
    dtype = x.dtype.scalar
    if dtype == tl.bfloat16:
        return interpreter.TensorHandle(_from_bfloat16(x.data), tl.float32)
    if dtype == tl.float16:
        return interpreter.TensorHandle(x.data.astype(np.float32), tl.float32)
    return x


def _from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Return the bits of the nearest bfloat16, ties to even.

    NaN stays NaN.
    """
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)
