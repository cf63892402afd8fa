"""Compute ratios, break-even points and kernel paths from records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .cases import Case, parse_case
from .contenders import CONTENDERS

Record = dict[str, Any]
PARTS = ("forward", "backward", "both")


def speedups(record: Record, part: str) -> dict[str, float]:
    """Return each measured peer's time over ours."""
    results = record["results"]
    ours = results.get("ours", {}).get("ms")
    if ours is None:
        return {}
    return {name: r["ms"][part] / ours[part] for name, r in results.items() if name != "ours" and "ms" in r}


def best_peer(record: Record, part: str) -> tuple[str, float] | None:
    """Return the fastest same-mask peer, and its time over ours."""
    peers = {name: ratio for name, ratio in speedups(record, part).items() if CONTENDERS[name].sparse}
    return min(peers.items(), key=lambda item: item[1]) if peers else None


def best_dense(record: Record, part: str) -> tuple[str, float] | None:
    """Return the fastest dense causal peer, and its time over ours."""
    peers = {name: ratio for name, ratio in speedups(record, part).items() if not CONTENDERS[name].sparse}
    return min(peers.items(), key=lambda item: item[1]) if peers else None


def series(records: Sequence[Record], like: Case) -> list[Record]:
    """Return records that differ from a case only in length, shortest first."""
    fields = ("block", "local", "stride", "heads", "kv_heads", "dim")
    return sorted(
        (r for r in records if all(r[f] == getattr(like, f) for f in fields)), key=lambda record: record["length"]
    )


def density_series(records: Sequence[Record], like: Case) -> list[Record]:
    """Return records with a case's length, block and heads, sparsest first.

    Their patterns may differ.
    """
    fields = ("block", "length", "heads", "kv_heads", "dim")
    return sorted(
        (r for r in records if all(r[f] == getattr(like, f) for f in fields)), key=lambda record: record["density"]
    )


def break_even(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Find where a speed-up over x passes 1.

    Between measured points it is interpolated linearly in the logarithms of both.

    Args:
        points: (x, speed-up), ascending in x.
    Returns:
        "at": the first x from which on (in the given order) the speed-up is at least 1; None if there is none.
        "bound": "measured" if it is between two points, "end" if it already holds at the first.
    """
    if points[-1][1] < 1:
        return {"at": None, "bound": "measured"}
    at = len(points) - 1
    while at > 0 and points[at - 1][1] >= 1:
        at -= 1
    if at == 0:
        return {"at": points[0][0], "bound": "end"}
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    share = -math.log(y0) / (math.log(y1) - math.log(y0))
    return {"at": math.exp(math.log(x0) + share * (math.log(x1) - math.log(x0))), "bound": "measured"}


def summary(records: Sequence[Record]) -> Record:
    """Return ratios by case and part, and break-even points against cuDNN.

    Break-even length and density are given by series and part.
    """
    ratios = {
        r["case"]: {
            part: {"over": speedups(r, part), "best_peer": best_peer(r, part), "best_dense": best_dense(r, part)}
            for part in PARTS
            if speedups(r, part)
        }
        for r in records
    }
    lengths: dict[str, Record] = {}
    densities: dict[str, Record] = {}
    for record in records:
        case = parse_case(record["case"])
        heads = f"{case.heads}/{case.kv_heads} d{case.dim}"
        along, across = series(records, case), density_series(records, case)
        if len(_points(along, "length", "both")) > 1:
            lengths[f"{case.mask_name} {heads}"] = {p: break_even(_points(along, "length", p)) for p in PARTS}
        if len(_points(across, "density", "both")) > 2:
            # from dense to sparse: the density below which ours is faster
            name = f"b{case.block} {case.length} tokens {heads}"
            densities[name] = {p: break_even(_points(across, "density", p)[::-1]) for p in PARTS}
    return {"ratios": ratios, "break_even_length": lengths, "break_even_density": densities}


def _points(records: Sequence[Record], key: str, part: str) -> list[tuple[float, float]]:
    found = [(record[key], speedups(record, part).get("cudnn")) for record in records]
    return [(x, ratio) for x, ratio in found if ratio is not None]


def kernel_paths(result: Record) -> str:
    """Return our kernels forward / backward, such as "hopper / triton".

    Derived from the names of launched kernels.
    """
    return " / ".join(_path(result.get("kernels", ()), part) for part in ("_fwd_", "_bwd_"))


def _path(kernels: Sequence[str], part: str) -> str:
    names = [name for name in kernels if part in name]
    if not names:
        return "torch"
    return "hopper" if any("hopper" in name for name in names) else "triton"


def launch_ratios(record: Record, measure: str) -> dict[str, tuple[float, float]]:
    """Return peers' times of one call, divided by ours.

    Times are of the forward pass, and of forward and backward together. `measure` is "eager_ms", "graph_ms" or
    "device_ms". Peers without it (a failed capture) are left out; if ours has none, all are.
    """
    times = {
        name: (result["forward"][measure], result["both"][measure])
        for name, result in record["results"].items()
        if "error" not in result and result["forward"][measure] and result["both"][measure]
    }
    ours = times.pop("ours", None)
    return {} if ours is None else {name: (t[0] / ours[0], t[1] / ours[1]) for name, t in times.items()}
