"""A repair of Triton's interpreter, in which the kernels run where there is no GPU (tests)."""

from typing import Any

from triton.runtime import interpreter


def repair_interpreter() -> None:
    """Let kernel scalars bound a `range`: the interpreter of Triton 3.6 holds them as arrays of one element, which
    NumPy 2.4 refuses to take for an integer. Triton 3.7 has the same repair."""
    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch
