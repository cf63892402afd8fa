"""Run one comparison or timing of `s2train.kernels.check` on the current device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention import Backend, block_sparse_attention
from ..hopper.backward_config import chosen_config
from ..hopper.support import backward_choice, is_hopper, kernel_choice
from ..layout import BlockLayout
from ..reference import reference_attention
from ..relative_error import relative_error
from ..spec import AttentionSpec, Format, from_bhsd, to_bhsd
from ..topk_layout import Layout, TopKLayout
from .cases import Case, Timing
from .run_time import fresh_steps, is_nothing, random_indices

_NAMES = ("out", "lse", "dq", "dk", "dv")
_FLOOR = 3e-7  # relative error that is always accepted


def _results(out: Tensor, lse: Tensor, inputs: list[Tensor], dout: Tensor | None, dlse: Tensor | None) -> list[Tensor]:
    """Return out, lse (0 in place of -inf), dq, dk, dv."""
    finite = lse.masked_fill(lse == -torch.inf, 0)
    given = [(x, dx.to(x.dtype)) for x, dx in ((out, dout), (finite, dlse)) if dx is not None]
    gradients = torch.autograd.grad(
        [x for x, _ in given], inputs, [dx for _, dx in given], retain_graph=True, materialize_grads=True
    )
    return [x.detach() for x in (out, finite, *gradients)]


def compare(measured: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> dict[str, Any]:
    """Compare errors of the kernels with those of plain torch.

    Returns relative errors (kernel, plain torch) by name, and whether all are ok. An error is ok if it is at most twice
    torch's.
    """
    result: dict[str, Any] = {"ok": True}
    for name, x, same_dtype, x64 in zip(_NAMES[: len(exact)], measured, plain, exact, strict=True):
        error, allowed = relative_error(x, x64), relative_error(same_dtype, x64)
        result[name] = (error, allowed)
        result["ok"] &= error <= 2 * allowed + _FLOOR  # false for NaN too
    return result


def problem(case: Case, device: torch.device) -> tuple[list[Tensor], Layout, dict[str, Any]]:
    """Make random q, k, v, a layout and options of `block_sparse_attention`."""
    dtype = getattr(torch, case.dtype)
    length = sum(case.documents) or case.s_q
    s_k = length if case.documents else case.s_k or case.query_offset + case.s_q
    n_q, n_k = -(-(case.query_offset + length) // case.block), -(-s_k // case.block)
    layout = _layout(case, n_q, n_k, device)

    def random(heads: int, s: int, dim: int) -> Tensor:
        x = torch.randn(case.batch, heads, s, dim, device=device).to(dtype)
        return from_bhsd(x, case.format).contiguous()  # type: ignore[arg-type]

    if case.fused:
        q, k, v = random(case.heads, length, 3 * case.dim).split(case.dim, -1)
        inputs = [q, k, v]
    else:
        inputs = [random(case.heads, length, case.dim), random(case.kv_heads, s_k, case.dim)]
        inputs.append(random(case.kv_heads, s_k, case.v_dim or case.dim))
    options: dict[str, Any] = {
        "causal": case.causal, "query_offset": case.query_offset, "format": case.format,
        "backend": "portable" if case.portable else "triton", "split_columns": case.split,
    }  # fmt: skip
    if case.documents:
        bounds = torch.tensor((0, *case.documents), device=device).cumsum(0)
        options["cu_seqlens"] = bounds.to(torch.int32)
    return inputs, layout, options


def _layout(case: Case, n_q: int, n_k: int, device: torch.device) -> Layout:
    if case.layout in ("static", "static batch"):
        batch = (case.batch,) if case.layout == "static batch" else ()
        mask = torch.rand(*batch, case.heads, n_q, n_k, device=device) < case.keep
        mask[..., 0] |= case.sink
        if case.stripes:
            mask |= _stripes(case, n_q, n_k, device)
        return BlockLayout.from_mask(mask, case.block)
    lists = case.heads if case.layout == "top-k" else case.kv_heads
    indices = random_indices(case.batch, lists, n_q, n_k, case.keep, device)
    if case.sink:
        indices[..., -1] = 0
    return TopKLayout.from_indices(indices, case.block, num_heads=case.heads, num_key_blocks=n_k)


def _stripes(case: Case, n_q: int, n_k: int, device: torch.device) -> Tensor:
    """Build the bool mask [heads, n_q, n_k] of local windows and stripes."""
    key, head = torch.arange(n_k, device=device), torch.arange(case.heads, device=device)
    distance = torch.arange(n_q, device=device)[:, None] - key
    window = (distance >= 0) & (distance < -(-512 // case.block))
    return window | ((key + 1 + head[:, None]) % case.stripes == 0)[:, None]


def check_case(case: Case, device: torch.device) -> dict[str, Any]:
    """Compute errors of the kernels and of plain torch against float64.

    Plain torch uses the case's dtype.
    """
    inputs, layout, options = problem(case, device)
    leaves = [x.requires_grad_() for x in inputs]
    # the same values and strides elsewhere
    copies = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device) for x in inputs]
    copies = [copy.copy_(x.detach()).requires_grad_() for copy, x in zip(copies, inputs, strict=True)]
    q, k, v = leaves

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return block_sparse_attention(q, k, v, layout, return_lse=True, **options)

    with _deterministic(case.deterministic):
        out, lse = attend(*leaves)
        dout = None if case.gradients == "lse" else torch.randn_like(out) * case.dout_scale
        dlse = None if case.gradients == "out" else torch.randn_like(lse)
        measured = _results(out, lse, leaves, dout, dlse)
        kernels = kernels_run(q, k, v, layout, **options)
        # run again: a layout keeps compiled kernels after the first call, and launches after the second
        _results(*attend(*leaves), leaves, dout, dlse)
        again = _results(*attend(*copies), copies, dout, dlse)

    shape_options = {name: value for name, value in options.items() if name not in ("backend", "split_columns")}

    def reference(dtype: torch.dtype) -> list[Tensor]:
        cast = [x.detach().to(dtype) for x in inputs]
        return _reference(case, cast, layout, shape_options, dout, dlse)

    plain, exact = reference(q.dtype), reference(torch.float64)
    result = kernels | compare(measured, plain, exact)
    # rows without keys: -inf in the same places
    result["ok"] &= bool(((lse == -torch.inf) == (exact[1] == 0)).all())
    result["ok"] &= compare(again, plain, exact)["ok"]
    if case.steps:
        assert isinstance(layout, TopKLayout)
        left = fresh_steps(
            leaves, layout, shape_options | {"split_columns": case.split}, case.keep, case.steps, options["backend"]
        )
        result |= left
        result["ok"] &= is_nothing(left)
    if case.hopper_forward and is_hopper(device):
        result["ok"] &= result["forward"] == "hopper"
    if case.deterministic:
        result["ok"] &= all(x.equal(y) for x, y in zip(measured, again, strict=True))
    return result


def _reference(
    case: Case, inputs: list[Tensor], layout: Layout, options: dict[str, Any], dout: Tensor | None, dlse: Tensor | None
) -> list[Tensor]:
    """Compute `_results` of the oracle, in the inputs' dtype.

    `case.oracle_rows` are computed at a time; their dk and dv are added in float64.
    """
    q, k, v = inputs
    axis = case.format.index("s")
    length = q.shape[axis]
    rows = case.oracle_rows or length
    of_rows: list[list[Tensor]] = []
    of_keys: list[Tensor] = []
    for first in range(0, max(length, 1), rows):
        count = min(rows, length - first)
        leaves = [x.detach().requires_grad_() for x in (q.narrow(axis, first, count), k, v)]
        at = options | {"query_offset": case.query_offset + first}
        given = (
            None if dout is None else dout.narrow(axis, first, count),
            None if dlse is None else dlse.narrow(-1, first, count),
        )
        *found, dk, dv = _results(
            *reference_attention(leaves[0], leaves[1], leaves[2], layout, **at), leaves, *given
        )  # fmt: skip
        of_rows.append(found)
        grads = [dk.double(), dv.double()]
        of_keys = [x + y for x, y in zip(grads, of_keys, strict=True)] if of_keys else grads
    out, lse, dq = (torch.cat(x, d) for x, d in zip(zip(*of_rows, strict=True), (axis, -1, axis), strict=True))
    return [out, lse, dq, *(x.to(k.dtype) for x in of_keys)]


@contextmanager
def _deterministic(enabled: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def kernels_run(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, causal: bool = True, query_offset: int = 0,
    cu_seqlens: Tensor | None = None, format: Format = "sbhd", backend: Backend = "triton", split_columns: bool = False,
) -> dict[str, str]:  # fmt: skip
    """Return which kernels run forward and backward.

    "choices" are those of Hopper's backward.
    """
    if backend == "portable":
        return {"forward": "triton", "backward": "triton", "choices": ""}
    spec = AttentionSpec(1.0, causal, query_offset, cu_seqlens, format, split_columns=split_columns)
    arguments = (to_bhsd(q, format), to_bhsd(k, format), to_bhsd(v, format), layout, spec)
    backward = backward_choice(*arguments)
    choices = backward_choices(*arguments) if backward == "hopper" else ""
    return {"forward": kernel_choice(*arguments), "backward": backward, "choices": choices}


def backward_choices(q: Tensor, k: Tensor, v: Tensor, layout: Layout, spec: AttentionSpec) -> str:
    """Name the choices of Hopper's backward that differ from plain settings.

    Tensors are views [b, h, s, d].
    """
    from ..hopper.call_schedule import schedule_of_call
    from ..hopper.pair_parts import PairParts
    from ..hopper.shared_tiles import SharedTiles

    (batch, _, s_q, dim), (_, num_kv_heads, s_k, _) = q.shape, k.shape
    options = chosen_config(layout, dim, num_kv_heads, s_q, spec).schedule
    schedule = schedule_of_call(layout, num_kv_heads, s_q, s_k, spec, batch // layout.batch_size, options)
    found = {
        f"{options.query_tile} queries": options.query_tile > 64,
        "second pairs": isinstance(schedule.parts, SharedTiles),
        "cut": isinstance(schedule.parts, PairParts),
        "by query head": options.by_query_head,
    }
    return ", ".join(name for name, is_chosen in found.items() if is_chosen)


def time_case(case: Timing) -> dict[str, Any]:
    """Measure median milliseconds forward and backward, and torch's dense attention.

    Checks the first KV group's heads first.
    """
    q, k, v, dout = (
        torch.randn(case.length, 1, heads, case.dim, device="cuda", dtype=torch.bfloat16)
        for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    )
    blocks = torch.arange(case.length // case.block, device="cuda")
    distance = blocks[:, None] - blocks[None, :]
    patterns = torch.stack(
        [(distance < case.local) | ((blocks - offset) % case.stride == 0)[None, :] for offset in range(case.stride)]
    )
    patterns &= distance >= 0
    pattern_of_head = [h % case.stride for h in range(case.heads)]
    layout = BlockLayout.from_patterns(patterns, pattern_of_head, case.block)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = block_sparse_attention(q, k, v, layout, backend="triton")
    grads = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    checked = _check_one_head(case, patterns, leaves, dout, out, grads)
    if not checked["ok"]:
        return checked | {"error": f"wrong results: {checked}"}

    in_diagonal = case.block * (case.block + 1) // 2
    below = patterns.sum((1, 2)) - len(blocks)
    kept = [int(n) * case.block**2 + len(blocks) * in_diagonal for n in below.tolist()]
    positions = sum(kept[p] for p in pattern_of_head)
    flops = 4 * case.dim * positions
    forward_ms = _median_ms(lambda: block_sparse_attention(q, k, v, layout, backend="triton"), no_grad=True)
    backward_ms = _median_ms(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))
    dense_q, dense_k, dense_v = dense_leaves = [
        x.detach().permute(1, 2, 0, 3).contiguous().requires_grad_() for x in (q, k, v)
    ]

    def dense() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(dense_q, dense_k, dense_v, is_causal=True, enable_gqa=True)

    dense_out, dense_dout = dense(), dout.permute(1, 2, 0, 3).contiguous()
    return checked | {
        **kernels_run(q, k, v, layout, split_columns=True),
        "forward_ms": forward_ms,
        "backward_ms": backward_ms,
        "forward_tflops": flops / forward_ms / 1e9,
        "backward_tflops": 2.5 * flops / backward_ms / 1e9,
        "dense_forward_ms": _median_ms(dense, no_grad=True),
        "dense_backward_ms": _median_ms(
            lambda: torch.autograd.grad(dense_out, dense_leaves, dense_dout, retain_graph=True)
        ),
        "density": positions / case.heads / (case.length * (case.length + 1) / 2),
    }


def _check_one_head(
    case: Timing, patterns: Tensor, leaves: list[Tensor], dout: Tensor, out: Tensor, grads: tuple[Tensor, ...]
) -> dict[str, Any]:
    """Compute relative errors of the last KV head's part against float32.

    The scores of a single head fit in memory.
    """
    group = case.heads // case.kv_heads
    first = case.heads - group
    k, v = (x[:, :, -1:].detach().float().requires_grad_() for x in leaves[1:])
    measured = {"out": out[:, :, first:], "dq": grads[0][:, :, first:], "dk": grads[1][:, :, -1:]}
    measured["dv"] = grads[2][:, :, -1:]
    parts: dict[str, list[Tensor]] = {"out": [], "dq": []}
    for h in range(first, case.heads):
        q = leaves[0][:, :, h : h + 1].detach().float().requires_grad_()
        keep = BlockLayout.from_mask(patterns[[h % case.stride]], case.block)
        expected, _ = reference_attention(q, k, v, keep)
        expected.backward(dout[:, :, h : h + 1].float())
        parts["out"].append(expected.detach())
        assert q.grad is not None
        parts["dq"].append(q.grad)
        del expected
    exact = {name: torch.cat(heads, 2) for name, heads in parts.items()} | {"dk": k.grad, "dv": v.grad}
    errors = {}
    for name, x in measured.items():
        reference = exact[name]
        assert reference is not None
        errors[name] = relative_error(x, reference)
    return {"ok": all(error < 1e-2 for error in errors.values()), "errors": errors}


def _median_ms(run: Callable[[], Any], no_grad: bool = False) -> float:
    with torch.set_grad_enabled(not no_grad):
        return triton.testing.do_bench(run, warmup=50, rep=300, return_mode="median")
