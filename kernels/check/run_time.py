"""Check layouts made in every step.

Steps with new ones must not wait, compile or leak.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from .. import handles
from ..attention import Backend, block_sparse_attention
from ..topk_layout import TopKLayout

_WARM_STEPS = 3  # may compile and fill the allocator
_PATIENCE = 100  # attempts to find the memory of the steps freed


def random_indices(
    batch: int, lists: int, n_q: int, n_k: int, keep: float, device: torch.device | str = "cpu"
) -> Tensor:  # fmt: skip
    """Draw top-k lists, int32 [batch, lists, n_q, n_k + 1].

    Each block is listed with probability `keep`, in any order, some twice, with -1 between.
    """
    blocks = torch.rand(batch, lists, n_q, n_k, device=device).argsort(-1)
    blocks = torch.where(torch.rand(blocks.shape, device=device) < keep, blocks, -1)
    again = blocks.gather(-1, torch.randint(n_k, (batch, lists, n_q, 1), device=device))
    return torch.cat([blocks, again], -1).to(torch.int32)


def fresh_steps(
    inputs: list[Tensor], layout: TopKLayout, options: dict[str, Any], keep: float, steps: int,
    backend: Backend = "triton",
) -> dict[str, Any]:  # fmt: skip
    """Run `steps` passes with new lists and report what they leave.

    Each pass is forward and backward. `is_nothing` should hold for the result. On a GPU an operation that makes the
    host wait raises RuntimeError.

    Args:
        inputs: q, k and v, which require gradients.
        layout: has the same number of lists and blocks as the new ones.

    Returns:
        "compiled": names of kernels compiled meanwhile; "registered": additional handles; "grown bytes": additional
        device memory.
    """
    device = layout.device
    gradient: Tensor | None = None

    def step() -> None:
        nonlocal gradient
        sizes = (layout.batch_size, layout.num_lists, layout.num_query_blocks, layout.num_key_blocks)
        fresh = TopKLayout.from_indices(
            random_indices(*sizes, keep, device), layout.block_size, num_heads=layout.num_heads,
            num_key_blocks=layout.num_key_blocks,
        )  # fmt: skip
        out = block_sparse_attention(*inputs, fresh, backend=backend, **options)  # type: ignore[call-overload]
        gradient = torch.ones_like(out) if gradient is None else gradient
        torch.autograd.grad(out, inputs, gradient)

    for _ in range(_WARM_STEPS):
        step()
    allocated = _allocated(device)  # first: it collects garbage, layouts among it
    registered = len(handles.live_numbers())
    with _host_never_waits(device), _compiled() as names:
        for _ in range(steps):
            step()
    grown = _grown(device, allocated)
    return {
        "steps": steps,
        "compiled": names,
        "registered": len(handles.live_numbers()) - registered,
        "grown bytes": grown,
    }


def _grown(device: torch.device, allocated: int) -> int:
    """Device memory beyond `allocated`.

    Autograd's thread may hold tensors of the last backward for a moment after it has returned.
    """
    for _ in range(_PATIENCE):
        if (grown := _allocated(device) - allocated) <= 0:
            break
        time.sleep(0.01)
    return grown


def _allocated(device: torch.device) -> int:
    gc.collect()  # otherwise garbage of earlier code could be freed meanwhile
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def is_nothing(left: dict[str, Any]) -> bool:
    """Return whether steps that leave this behind could continue forever."""
    return not left["compiled"] and left["registered"] <= 0 and left["grown bytes"] <= 0


@contextmanager
def _host_never_waits(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def _compiled() -> Iterator[list[str]]:
    """Collect names of Triton kernels that are compiled meanwhile."""
    names: list[str] = []
    before = knobs.runtime.jit_post_compile_hook

    def note(**details: Any) -> None:
        names.append(str(details.get("repr", "?"))[:80])

    knobs.runtime.jit_post_compile_hook = note
    try:
        yield names
    finally:
        knobs.runtime.jit_post_compile_hook = before
