"""Choose a dense layer's kernels: the fastest measured for its call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from .flash4 import PACKAGE, fa4_problem, fa4_unsupported_reason
from .verified import verified
from .versions import installed_version

Kind = Literal["whole", "later", "documents"]
IMPLEMENTATIONS = ("fa4", "s2train", "cudnn", "flash", "efficient")

# Fastest first, forward and backward together, on an H100 (`ORDER_FILE`). For later queries s2train took 1 % less time
# than fa4, within the spread. torch's kernels take no packed documents; cuDNN's take no later queries.
_ORDER: dict[Kind, tuple[str, ...]] = {
    "whole": ("fa4", "s2train", "cudnn", "flash", "efficient"),
    "later": ("fa4", "s2train", "flash", "efficient"),
    "documents": ("fa4", "s2train"),
}
_SHORT_ORDER = ("fa4", "cudnn", "s2train", "flash", "efficient")  # of whole sequences below `LONG` tokens
LONG = 8192
# Beyond the longest measured length s2train comes last: its layout, which keeps every block, grows with the square of
# the length, to gigabytes at a million tokens.
LONGEST = 131_072
ORDER_FILE = "2026-11-28-h100-dense-check.json"  # in kernels/results


def dense_order(kind: Kind, length: int) -> tuple[str, ...]:
    """Return the implementations for such calls over `length` keys, fastest first."""
    if kind == "whole" and length < LONG:
        return _SHORT_ORDER
    if length > LONGEST:
        return (*(name for name in _ORDER[kind] if name != "s2train"), "s2train")
    return _ORDER[kind]


@dataclass(frozen=True)
class DenseCall:
    """Properties of a call that the choice depends on.

    They are equal on all ranks.

    Attributes:
        kind: whole sequences; later queries, which end with the keys but start after them; packed documents.
        grouped: fewer KV heads than query heads.
        deterministic: results must be the same bits in every run.
        length: keys, in tokens.
    """

    kind: Kind
    dtype: torch.dtype
    head_dim: int
    grouped: bool
    deterministic: bool
    capability: tuple[int, int] | None
    length: int

    @property
    def name(self) -> str:
        """Such as "whole bfloat16 d128 grouped deterministic"; omits device and length."""
        words = [self.kind, str(self.dtype).removeprefix("torch."), f"d{self.head_dim}"]
        words += ["grouped"] * self.grouped + ["deterministic"] * self.deterministic
        return " ".join(words)


@dataclass(frozen=True)
class DenseChoice:
    """The chosen kernels of a call.

    Attributes:
        kind: the call's.
        implementation: one of `IMPLEMENTATIONS`.
        passed: faster implementations that were skipped, each with its reason.
        by_name: the implementation was requested, not chosen.
    """

    kind: Kind
    implementation: str
    passed: tuple[tuple[str, str], ...] = ()
    by_name: bool = False

    def __str__(self) -> str:
        """Format as one line.

        For example "whole sequences: cudnn (not fa4: flash-attn-4 is not installed)".
        """
        kinds = {"whole": "whole sequences", "later": "later queries", "documents": "packed documents"}
        label = "s2train, every block kept" if self.implementation == "s2train" else self.implementation
        if self.by_name:
            return f"{kinds[self.kind]}: {label} (as asked)"
        why = "; ".join(f"not {name}: {reason}" for name, reason in self.passed) or "the fastest measured"
        return f"{kinds[self.kind]}: {label} ({why})"


def choose_dense(call: DenseCall, asked: str, serves: Callable[[str], str | None]) -> DenseChoice:
    """Choose the first implementation in measured order that takes a call.

    If `asked` is not "auto", return that implementation.

    Args:
        serves: returns why an implementation can't run the call, or None if it can.
    Raises:
        ValueError: the requested implementation can't run the call, or none can.
    """
    if asked not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"implementation={asked!r} must be one of auto, {', '.join(IMPLEMENTATIONS)}")
    if asked != "auto":
        why = _unsupported_reason(call, asked, serves, by_name=True)
        if why is not None:
            raise ValueError(f"dense_attention={asked} can't run {call.name} ({why}): set dense_attention=auto")
        return DenseChoice(call.kind, asked, by_name=True)
    passed: list[tuple[str, str]] = []
    for name in dense_order(call.kind, call.length):
        why = _unsupported_reason(call, name, serves, by_name=False)
        if why is None:
            return DenseChoice(call.kind, name, tuple(passed))
        passed.append((name, why))
    reasons = "; ".join(f"{name}: {why}" for name, why in passed)
    raise ValueError(f"no dense attention for {call.name}: {reasons}")


def takes_fa4(
    capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int, *, grouped: bool, deterministic: bool
) -> bool:
    """Return whether `auto` would use FlashAttention-4 in some of a model's calls.

    Assumes that its import works; imports nothing.
    """
    return any(
        _fa4_unsupported_reason(DenseCall(kind, dtype, head_dim, grouped, deterministic, capability, 0), by_name=False)
        is None
        for kind in _ORDER
    )


def _unsupported_reason(
    call: DenseCall, name: str, serves: Callable[[str], str | None], *, by_name: bool
) -> str | None:
    """Return why an implementation can't run a call, or None."""
    if name not in _ORDER[call.kind]:
        return "it takes no packed documents" if call.kind == "documents" else "it takes no later queries"
    if name != "fa4":
        return serves(name)
    return _fa4_unsupported_reason(call, by_name=by_name) or fa4_problem()


def _fa4_unsupported_reason(call: DenseCall, *, by_name: bool) -> str | None:
    """Return why FlashAttention-4 can't run a call, or None; imports nothing."""
    release = installed_version(PACKAGE)
    if release is None:
        return "flash-attn-4 is not installed"
    why = fa4_unsupported_reason(call.capability, call.dtype, call.head_dim)
    if why is not None or by_name:
        return why
    if verified(PACKAGE, release, call.capability, call.name) is None:
        return f"{PACKAGE} {release} was not checked for {call.name} on this GPU"
    return None
