"""Which kernels a dense layer runs for a call: the fastest measured of those that serve it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from .flash4 import fa4_problem, fa4_refuses, fa4_version
from .verified import verified

Kind = Literal["whole", "later", "documents"]
IMPLEMENTATIONS = ("fa4", "s2train", "cudnn", "flash", "efficient")

# Fastest first, forward and backward together on an H100 (`ORDER_FILE`). Of later queries s2train took 1 % less than
# fa4, within the spread. torch has no packed documents, and of cuDNN no later queries.
_ORDER: dict[Kind, tuple[str, ...]] = {
    "whole": ("fa4", "s2train", "cudnn", "flash", "efficient"),
    "later": ("fa4", "s2train", "flash", "efficient"),
    "documents": ("fa4", "s2train"),
}
_SHORT_ORDER = ("fa4", "cudnn", "s2train", "flash", "efficient")  # of whole sequences below `LONG` tokens
LONG = 8192
# Beyond the longest length measured s2train comes last: its layout of every block grows with the square of the length,
# to gigabytes at a million tokens.
LONGEST = 131_072
ORDER_FILE = "2026-11-28-h100-dense-check.json"  # in kernels/results


def dense_order(kind: Kind, length: int) -> tuple[str, ...]:
    """The implementations that have such calls over `length` keys, fastest first."""
    if kind == "whole" and length < LONG:
        return _SHORT_ORDER
    if length > LONGEST:
        return (*(name for name in _ORDER[kind] if name != "s2train"), "s2train")
    return _ORDER[kind]


@dataclass(frozen=True)
class DenseCall:
    """What a choice depends on, the same on every rank of a run.

    Attributes:
        kind: whole sequences; later queries, which end with the keys but begin after them; packed documents.
        grouped: fewer KV heads than query heads.
        deterministic: the same bits in every run are asked for.
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
        """Such as "whole bfloat16 d128 grouped deterministic"; device and length are not in it."""
        words = [self.kind, str(self.dtype).removeprefix("torch."), f"d{self.head_dim}"]
        words += ["grouped"] * self.grouped + ["deterministic"] * self.deterministic
        return " ".join(words)


@dataclass(frozen=True)
class DenseChoice:
    """The kernels that a call runs.

    Attributes:
        kind: of the call.
        implementation: one of `IMPLEMENTATIONS`.
        passed: the faster ones that were passed over, and why.
        by_name: it was asked for, not chosen.
    """

    kind: Kind
    implementation: str
    passed: tuple[tuple[str, str], ...] = ()
    by_name: bool = False

    def __str__(self) -> str:
        """One line, such as "whole sequences: cudnn (not fa4: flash-attn-4 is not installed)"."""
        kinds = {"whole": "whole sequences", "later": "later queries", "documents": "packed documents"}
        label = "s2train, every block kept" if self.implementation == "s2train" else self.implementation
        if self.by_name:
            return f"{kinds[self.kind]}: {label} (as asked)"
        why = "; ".join(f"not {name}: {reason}" for name, reason in self.passed) or "the fastest measured"
        return f"{kinds[self.kind]}: {label} ({why})"


def choose_dense(call: DenseCall, asked: str, serves: Callable[[str], str | None]) -> DenseChoice:
    """The first implementation in the measured order that serves a call; with another `asked` than auto, that one.

    Args:
        serves: why one of this package's and torch's implementations can't run the call; None if it can.
    Raises:
        ValueError: the asked-for one doesn't serve the call, or none does.
    """
    if asked not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"implementation={asked!r} must be one of auto, {', '.join(IMPLEMENTATIONS)}")
    if asked != "auto":
        why = _refusal(call, asked, serves, by_name=True)
        if why is not None:
            raise ValueError(f"dense_attention={asked} can't run {call.name} ({why}): set dense_attention=auto")
        return DenseChoice(call.kind, asked, by_name=True)
    passed: list[tuple[str, str]] = []
    for name in dense_order(call.kind, call.length):
        why = _refusal(call, name, serves, by_name=False)
        if why is None:
            return DenseChoice(call.kind, name, tuple(passed))
        passed.append((name, why))
    reasons = "; ".join(f"{name}: {why}" for name, why in passed)
    raise ValueError(f"no dense attention for {call.name}: {reasons}")


def takes_fa4(
    capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int, *, grouped: bool, deterministic: bool
) -> bool:
    """Whether `auto` takes FlashAttention-4 for some of a model's calls, if its import works. Imports nothing."""
    return any(
        _fa4_refusal(DenseCall(kind, dtype, head_dim, grouped, deterministic, capability, 0), by_name=False) is None
        for kind in _ORDER
    )


def _refusal(call: DenseCall, name: str, serves: Callable[[str], str | None], *, by_name: bool) -> str | None:
    if name not in _ORDER[call.kind]:
        return "it has no packed documents" if call.kind == "documents" else "it has no later queries"
    if name != "fa4":
        return serves(name)
    return _fa4_refusal(call, by_name=by_name) or fa4_problem()


def _fa4_refusal(call: DenseCall, *, by_name: bool) -> str | None:
    """Imports nothing."""
    if fa4_version() is None:
        return "flash-attn-4 is not installed"
    why = fa4_refuses(call.capability, call.dtype, call.head_dim)
    if why is not None or by_name:
        return why
    if verified("flash-attn-4", fa4_version(), call.capability, call.name) is None:
        return f"flash-attn-4 {fa4_version()} was not checked for {call.name} on this GPU"
    return None
