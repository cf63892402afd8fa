"""Relative errors of tensors."""

import math
from collections.abc import Iterable

from torch import Tensor


def relative_error(measured: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference over the norm of `exact`.

    Shapes are equal. Computes in the dtype of `exact`.
    """
    return ((measured.to(exact.dtype) - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def largest(errors: Iterable[float]) -> float:
    """Return the largest error; NaN if one is.

    Python's `max` drops a NaN that is not the first.
    """
    found = list(errors)
    return math.nan if any(map(math.isnan, found)) else max(found)
