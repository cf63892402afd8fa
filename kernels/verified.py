"""What other libraries' kernels were checked for on a GPU, and where that is written down.

`auto` takes such a kernel for what is listed here and for nothing else. An entry is made of what
`python launch/check_libraries.py` wrote: a case that it found right, in that release, on that architecture.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Verified:
    """Cases of one library's release that were found right on one GPU architecture.

    Attributes:
        library: its name on PyPI.
        release: as installed; another one is not verified.
        capability: compute capability of the GPU.
        file: the results, in `kernels/results` or `launch/results`.
        cases: names, as the results have them: `DenseCall.name`, or `OPERATION dtype` of an elementwise one.
    """

    library: str
    release: str
    capability: tuple[int, int]
    file: str
    cases: frozenset[str]


VERIFIED: tuple[Verified, ...] = ()


def verified(
    library: str,
    release: str | None,
    capability: tuple[int, int] | None,
    case: str,
    entries: Iterable[Verified] | None = None,
) -> str | None:
    """The file that a case of a library's release was found right in, on such a GPU; None if in none.

    Args:
        entries: the list to look in, `VERIFIED` by default.
    """
    for entry in VERIFIED if entries is None else entries:
        if (entry.library, entry.release, entry.capability) == (library, release, capability) and case in entry.cases:
            return entry.file
    return None
