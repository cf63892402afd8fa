"""Check a contender against float64.

It is checked on a whole short problem, and in samples at full length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..layout import BlockLayout
from ..reference import reference_attention
from ..relative_error import relative_error
from ..spec import Format
from .cases import Case
from .inputs import head_values, make_inputs, positions_of

_SHORT = 2048  # tokens of the short problem: a multiple of every block, longer than every measured window
_TAIL = 384  # last positions, for which the sample has every key
_ROWS = 32  # additional query rows of the sample
_FLOOR = 3e-7  # relative error that is always accepted
_NAMES = ("out", "dq", "dk", "dv")

Results = dict[str, Tensor]
"""out, dq [H, positions, d] and dk, dv [H_kv, positions, d], float64."""
Limits = dict[str, float]
"""The allowed relative error of each result."""


@dataclass(frozen=True)
class Exact:
    """Exact results at some positions, and the allowed relative error of each."""

    case: Case
    seed: int
    rows: Tensor
    keys: Tensor
    results: Results
    limits: Limits

    def errors(self, out: Tensor, gradients: tuple[Tensor, ...], format: Format) -> dict[str, float]:
        """Return relative errors of output, dq, dk and dv.

        The tensors are in the contender's format.
        """
        found = sample(out, gradients, format, self.rows, self.keys)
        return {name: relative_error(found[name], self.results[name]) for name in _NAMES}

    def wrong(self, errors: dict[str, float]) -> list[str]:
        """Return the names of results out of bounds, including NaN."""
        return [name for name, error in errors.items() if not error <= self.limits[name]]


def sample(out: Tensor, gradients: tuple[Tensor, ...], format: Format, rows: Tensor, keys: Tensor) -> Results:
    """Return the results at query positions `rows` and key positions `keys`."""
    dq, dk, dv = gradients
    return {
        "out": positions_of(out, format, rows),
        "dq": positions_of(dq, format, rows),
        "dk": positions_of(dk, format, keys),
        "dv": positions_of(dv, format, keys),
    }


def shortened(case: Case) -> Case:
    """Return the case at a length short enough for float64."""
    return replace(case, length=min(case.length, _SHORT))


def short_problem(short: Case, seed: int, device: torch.device) -> Exact:
    """Compute a whole short case.

    The allowed error is twice that of plain torch in bfloat16.
    """
    everything = torch.arange(short.length, device=device)
    exact, limits = whole_problem(make_inputs(short, seed, "sbhd", device), short.layout(device))
    return Exact(short, seed, everything, everything, exact, limits)


def whole_problem(inputs: tuple[Tensor, Tensor, Tensor, Tensor], layout: BlockLayout) -> tuple[Results, Limits]:
    """Compute all results of any layout in float64, and their limits.

    A limit is the allowed relative error: twice that of plain torch in bfloat16.

    Args:
        inputs: q, k, v and dout in format "sbhd", of batch 1.
    """
    *leaves, dout = inputs
    everything = torch.arange(len(dout), device=dout.device)

    def reference(dtype: torch.dtype) -> Results:
        cast = [x.detach().to(dtype).requires_grad_() for x in leaves]
        out, _ = reference_attention(cast[0], cast[1], cast[2], layout)
        dq, dk, dv = torch.autograd.grad(out, cast, dout.to(dtype))
        return sample(out, (dq, dk, dv), "sbhd", everything, everything)

    exact, same_dtype = reference(torch.float64), reference(torch.bfloat16)
    return exact, {name: 2 * relative_error(same_dtype[name], exact[name]) + _FLOOR for name in _NAMES}


@torch.no_grad()
def full_problem(case: Case, seed: int, limits: dict[str, float], device: torch.device) -> Exact:
    """Compute a sample of the case at full length.

    The sample has output and dq of some rows, and dk and dv of the last keys. Only the last rows see those keys, and
    all of these are in the sample, so no other rows are needed.
    """
    tail = torch.arange(max(0, case.length - _TAIL), case.length, device=device)
    rows = torch.cat([torch.randint(case.length, (_ROWS,), device=device), tail])
    keys = torch.arange(case.length, device=device)
    # a row drawn twice must count only once in dk and dv
    in_tail = slice(_ROWS, None)
    scale = 1 / math.sqrt(case.dim)
    group = case.heads // case.kv_heads
    results: dict[str, list[Tensor]] = {name: [] for name in _NAMES}
    for kv_head in range(case.kv_heads):
        k, v = (head_values(case, name, kv_head, seed, device).double() for name in ("k", "v"))
        dk, dv = (torch.zeros(len(tail), case.dim, dtype=torch.float64, device=device) for _ in range(2))
        for head in range(kv_head * group, (kv_head + 1) * group):
            q, dout = (head_values(case, name, head, seed, device)[rows].double() for name in ("q", "dout"))
            keep = case.keeps(head, rows[:, None], keys[None, :])
            weights = (q @ k.T * scale).masked_fill_(~keep, -torch.inf).softmax(-1)
            out = weights @ v
            delta = (dout * out).sum(-1, keepdim=True)
            dscores = (dout @ v.T - delta) * weights * scale
            results["out"].append(out)
            results["dq"].append(dscores @ k)
            dk += dscores[in_tail, tail].T @ q[in_tail]
            dv += weights[in_tail, tail].T @ dout[in_tail]
        results["dk"].append(dk)
        results["dv"].append(dv)
    return Exact(case, seed, rows, tail, {name: torch.stack(x) for name, x in results.items()}, limits)
