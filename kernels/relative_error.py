"""The relative error of a tensor."""

from torch import Tensor


def relative_error(measured: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference over the norm of `exact`.

    Shapes are equal. Computes in the dtype of `exact`.
    """
    return ((measured.to(exact.dtype) - exact).norm() / exact.norm().clamp(min=1e-30)).item()
