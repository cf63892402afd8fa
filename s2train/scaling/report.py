"""Formats each part's result in a few lines, and judges it."""

from typing import Any


def lines(part: str, result: dict[str, Any]) -> list[str]:
    """Format the result of a part of `launch/scaling.py`."""
    if "error" in result:
        return [f"{part}: {result['error']}"]
    return _REPORTS[part](result)


def is_done(result: Any) -> bool:
    """Whether a part has run to its end without an error."""
    return result is not None and not result.get("unfinished") and not has_failed(result)


def has_failed(result: Any) -> bool:
    """Whether a part or a program in it recorded an error."""
    if not isinstance(result, dict):
        return False
    errors = [result.get("error"), *result.get("errors", {}).values()]
    return any(isinstance(error, str) for error in errors) or any(map(has_failed, result.values()))


def disagrees(result: Any) -> bool:
    """Whether a part or a comparison in it found a difference."""
    if not isinstance(result, dict):
        return False
    return result.get("agrees") is False or any(map(disagrees, result.values()))


def _parity(result: dict[str, Any]) -> list[str]:
    text = [f"{name}: {error}" for name, error in result["errors"].items()]
    for name, value in result.get("deviation", {}).items():
        text.append(f"{name}: {value:.1e} from one process, rounding allows {result['tolerance']:.1e}")
    attention = result["cp_attention_fp32"]
    if "error" in attention:
        text.append(f"attention alone, fp32: {attention['error']}")
    for case, errors in attention.get("errors", {}).items():
        largest = ", ".join(f"{mode} {max(error.values()):.1e}" for mode, error in errors.items())
        text.append(f"attention alone, fp32, {case}: largest errors {largest}")
    return [*text, f"parity: {'holds' if result['agrees'] else 'FAILS'}"]


def _resume(result: dict[str, Any]) -> list[str]:
    if "fewer" in result:
        return _resume({name: value for name, value in result.items() if name != "fewer"}) + _resume(result["fewer"])
    text = [f"{name}: {error}" for name, error in result["errors"].items()]
    text += [
        f"{len(found)} {name.replace('_', ' ')}: {', '.join(map(str, found[:8]))}"
        for name in ("different_steps", "different_values")
        if (found := result.get(name))
    ]
    equal = f"equals an uninterrupted run bit for bit, including {result.get('saved_values')} saved values"
    return [*text, f"a resumed run on {result['processes']}: {equal if result['agrees'] else 'DIFFERS'}"]


def _scaling(result: dict[str, Any]) -> list[str]:
    return [
        f"{model} {name}: {row['error'] if 'error' in row else _figures(row)}"
        for model, rows in result["models"].items()
        for name, row in rows.items()
    ]


def _figures(row: dict[str, Any]) -> str:
    known = [f"{row[key]:.1%} {label}" for label, key in _SHARES if row.get(key) is not None]
    return ", ".join([f"{row['tokens_per_s']:,.0f} tokens/s", *known, *_memory(row)])


def _memory(row: dict[str, Any]) -> list[str]:
    if row["memory_gib"] is None:
        return []
    return [f"{row['memory_gib']:.1f} GiB ({row['planned_gib']:.1f} planned)"]


def _long(result: dict[str, Any]) -> list[str]:
    agreement = result["agreement"]
    text = [f"{name}: {error}" for name, error in agreement["errors"].items()]
    for name, value in agreement.get("deviation", {}).items():
        verdict = "agrees" if agreement["agrees"] else "DIFFERS"
        rounding = f"{value:.1e} from {agreement['compared_with']}, rounding allows {agreement['tolerance']:.1e}"
        text.append(f"{name} at {agreement['seq_length']:,} tokens {verdict}: {rounding}")
    for row in result["rows"].values():
        where = f"{row['model']}, {row['layers']} layers, {row['seq_length']:,} tokens, cp {row['cp']}"
        text.append(f"{where}: {row['error'] if 'error' in row else _step(row)}")
    return text


def _step(row: dict[str, Any]) -> str:
    predicted = "" if row["predicted_s"] is None else f" ({row['predicted_s']:.2f} predicted)"
    finite = "" if row["is_finite"] else "a loss is NOT FINITE, "
    return f"{finite}{row['step_time_s']:.2f} s{predicted}, {_figures(row)}"


def _cp_bytes(result: dict[str, Any]) -> list[str]:
    text = []
    for case in result["cases"]:
        slowest = {mode: _slowest(case["ranks"], mode) for mode in case["ranks"][0]["attention_ms"]}
        alone = [max(rank[key] for rank in case["ranks"]) for key in ("exchange_ms", "gather_ms")]
        times = ", ".join(f"{mode} {ms:.2f}" for mode, ms in slowest.items())
        text.append(
            f"{case['case']}, density {case['density']:.3f}: {case['share_of_gathering']:.1%} of the bytes, "
            f"{alone[0]:.2f} ms instead of {alone[1]:.2f}; forward and backward of attention in ms: {times}"
        )
    return [*text, _crossing(result["cases"])]


def _crossing(cases: list[dict[str, Any]]) -> str:
    """Say at which shares of the bytes blocks were faster.

    Checks the limit of `parallel.cp_exchange=auto`.
    """
    won = sorted(
        (case["share_of_gathering"], _slowest(case["ranks"], "blocks") < _slowest(case["ranks"], "gather"))
        for case in cases
    )
    shares = {
        wins: list(dict.fromkeys(f"{share:.1%}" for share, is_faster in won if is_faster is wins))
        for wins in (True, False)
    }
    faster, slower = (", ".join(shares[wins]) or "none" for wins in (True, False))
    return f"blocks were faster than gather at these shares of the bytes: {faster}; slower at: {slower}"


def _slowest(ranks: list[dict[str, Any]], mode: str) -> float:
    return max(sum(rank["attention_ms"][mode].values()) for rank in ranks)


def _balance(result: dict[str, Any]) -> list[str]:
    return [
        f"{name}: slowest rank {case['before']['spread']:.1%} over the mean, balanced {case['after']['spread']:.1%}"
        for kind in ("tensor_parallel", "context_parallel")
        for name, case in result[kind].items()
    ]


_SHARES = (
    ("of linear scaling", "efficiency"),
    ("MFU", "mfu"),
    ("communication exposed", "communication_exposed"),
    ("hidden", "communication_hidden"),
)
_REPORTS = {
    "parity": _parity,
    "resume": _resume,
    "scaling": _scaling,
    "cp_bytes": _cp_bytes,
    "balance": _balance,
    "long": _long,
}
