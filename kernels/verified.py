"""Cases that other libraries' kernels passed on a GPU.

`auto` uses such a kernel only for the cases listed here. Each entry comes from the output of
`python launch/check_libraries.py`: a case with correct results, for one release on one architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Verified:
    """Cases of one library release that passed on one GPU architecture.

    Attributes:
        library: its name on PyPI; triton for a kernel of ours that `auto` takes only where it was checked.
        release: the installed version; any other version counts as unverified.
        capability: compute capability of the GPU.
        file: the results, in `kernels/results` or `launch/results`.
        cases: `DenseCall.name`, or an elementwise operation and the run's precision, such as `swiglu bf16`.
    """

    library: str
    release: str
    capability: tuple[int, int]
    file: str
    cases: frozenset[str]


def _dense_cases() -> frozenset[str]:
    """Return all call types in bfloat16, and one group in float16.

    The float16 calls have head dimension 128 and grouped heads, and are not deterministic.
    """
    kinds = ("whole", "later", "documents")
    words = product(kinds, ("bfloat16 d64", "bfloat16 d128"), ("", " grouped"), ("", " deterministic"))
    narrow = {f"{kind} {shape}{heads}{bits}" for kind, shape, heads, bits in words}
    return frozenset(narrow | {f"{kind} float16 d128 grouped" for kind in kinds})


VERIFIED: tuple[Verified, ...] = (
    Verified("flash-attn-4", "4.0.0b36", (9, 0), "2026-11-28-h100-dense-check.json", _dense_cases()),
    Verified(
        "liger-kernel",
        "0.8.5",
        (9, 0),
        "2026-11-28-h100-elementwise.json",
        frozenset(f"{name} {dtype}" for name in ("swiglu", "loss liger", "loss linear") for dtype in ("bf16", "fp32")),
    ),
    Verified(
        "liger-kernel",
        "0.8.5",
        (9, 0),
        "2026-11-28-h100-rotation.json",
        frozenset({"rotation bf16", "rotation fp32"}),
    ),
    Verified(
        "liger-kernel",
        "0.8.5",
        (9, 0),
        "2026-11-29-h200-elementwise.json",
        frozenset(f"{name} {dtype}" for name in ("sums", "loss in_place") for dtype in ("bf16", "fp32")),
    ),
    # our split of heads
    Verified("triton", "3.6.0", (9, 0), "2026-11-29-h200-elementwise.json", frozenset({"split bf16", "split fp32"})),
)


def verified(
    library: str,
    release: str | None,
    capability: tuple[int, int] | None,
    case: str,
) -> str | None:
    """Return the results file that verifies a case, or None.

    The case is one of a release on a GPU.
    """
    for entry in VERIFIED:
        if (entry.library, entry.release, entry.capability) == (library, release, capability) and case in entry.cases:
            return entry.file
    return None
