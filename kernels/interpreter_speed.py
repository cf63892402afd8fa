"""Make Triton's interpreter faster.

It spends most of its time on the types of tensors.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

# Values that hold no constexpr.
_PLAIN = frozenset((int, float, bool, str, type(None), tl.dtype, tl.pointer_type, tl.block_type))


def speed_up_interpreter() -> None:
    """Make the interpreter compute results of shapes and dtypes once.

    Results and errors stay as they are. Call it once.
    """
    unwrap, dtype_equal, numpy_dtype = tl.core._unwrap_if_constexpr, tl.dtype.__eq__, interpreter._get_np_dtype
    broadcast = TritonSemantic.broadcast_impl_value
    numpy_dtypes: dict[str, np.dtype] = {}

    def unwrap_if_constexpr(value: Any) -> Any:
        return value if type(value) in _PLAIN else unwrap(value)

    def make_block_type(self: Any, element_ty: Any, shape: Any) -> None:
        self.element_ty = element_ty
        self.shape, self.numel, text = _block_shape(tuple([unwrap_if_constexpr(size) for size in shape]))
        self.name = f"<{text}, {element_ty}>"

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = _tensor_shape(tuple(type.shape) if type.is_block() else ())

    def equal(self: Any, other: Any) -> bool:
        return self is other or dtype_equal(self, other)

    def get_np_dtype(dtype: Any) -> np.dtype:
        name = dtype.scalar.name
        if name not in numpy_dtypes:
            numpy_dtypes[name] = numpy_dtype(dtype)
        return numpy_dtypes[name]

    def broadcast_what_differs(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        left, right = (x.type.shape if x.type.is_block() else None for x in (lhs, rhs))
        return (lhs, rhs) if left is right else broadcast(self, lhs, rhs)

    tl.core._unwrap_if_constexpr, interpreter._get_np_dtype = unwrap_if_constexpr, get_np_dtype
    tl.block_type.__init__, tl.tensor.__init__, tl.dtype.__eq__ = make_block_type, make_tensor, equal
    TritonSemantic.broadcast_impl_value = broadcast_what_differs
    # Overflows are computed, but not reported: its `device_assert` does nothing.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


@cache
def _block_shape(sizes: tuple[int, ...]) -> tuple[Any, int, str]:
    """Return a block type's shape, number of elements, and shape as text."""
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    shape = tl.tuple(sizes)
    return shape, tl.core.validate_block_shape(shape), str(shape)


@cache
def _tensor_shape(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    """Return a tensor's shape and number of elements."""
    return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(int(np.prod(sizes)))
