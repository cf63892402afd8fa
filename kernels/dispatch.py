"""Report which kernels a call runs, and why not Hopper's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .arguments import check_positions, check_tensors
from .attention import Backend, resolve_backend
from .layout import BlockLayout
from .spec import AttentionSpec, Format, shape_bhsd, to_bhsd
from .topk_layout import Layout

Kernels = Literal["hopper", "portable", "torch"]
_Supported = Callable[[Tensor, Tensor, Tensor, Layout, AttentionSpec], bool]
_LENGTH = 1024


@dataclass(frozen=True)
class KernelsInUse:
    """Kernels of one call's forward and backward, and why not Hopper's.

    A reason is "" where the kernels are Hopper's.
    """

    forward: Kernels
    backward: Kernels
    why_forward: str
    why_backward: str

    def __str__(self) -> str:
        """Format as one line: "forward hopper, backward portable (head dimensions 64, 64)"."""
        forward, backward = (f" ({why})" if why else "" for why in (self.why_forward, self.why_backward))
        return f"forward {self.forward}{forward}, backward {self.backward}{backward}"


def kernels_in_use(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    causal: bool = True,
    query_offset: int = 0,
    cu_seqlens: Tensor | None = None,
    format: Format = "sbhd",
    backend: Backend = "auto",
) -> KernelsInUse:
    """Return the kernels that `block_sparse_attention` runs for these arguments.

    Computes nothing. Arguments and errors are those of `block_sparse_attention`. The answer for the backward holds
    until `torch.use_deterministic_algorithms` changes, and for an output gradient of any strides.
    """
    check_tensors(q, k, v, layout, format)
    resolved = resolve_backend(backend, q.device)
    spec = AttentionSpec(1.0, causal, query_offset, cu_seqlens, format, portable=resolved == "portable")
    check_positions(shape_bhsd(q, format), shape_bhsd(k, format)[2], layout, spec)
    if resolved != "triton":
        why = "no CUDA device" if backend == "auto" else f"backend={backend}"
        return KernelsInUse(resolved, resolved, why, why)
    from .hopper.support import backward_choice, hopper_backward_supported, hopper_forward_supported, kernel_choice

    arguments = (to_bhsd(q, format), to_bhsd(k, format), to_bhsd(v, format), layout, spec)
    why_forward, why_backward = "", ""
    if kernel_choice(*arguments) != "hopper":
        why_forward = why_no_hopper(q.device) or _reasons(hopper_forward_supported, *arguments)
    if backward_choice(*arguments) != "hopper":
        why_backward = why_no_hopper(q.device) or _reasons(hopper_backward_supported, *arguments)
        if torch.are_deterministic_algorithms_enabled() and not why_backward:
            why_backward = "deterministic algorithms are enabled"
    return KernelsInUse(
        "portable" if why_forward else "hopper", "portable" if why_backward else "hopper", why_forward, why_backward
    )


def why_no_hopper(device: torch.device) -> str:
    """Return why no Hopper kernel runs on this device, or ""."""
    import triton

    from .hopper.support import TRITON, is_hopper

    if is_hopper(device):
        return ""
    if device.type != "cuda":
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, not 9.0"
    releases = ", ".join(f"{release}x" for release in TRITON)
    return f"Triton {triton.__version__}: Hopper kernels need one of {releases}, as torch 2.11 to 2.15 install"


def _reasons(supported: _Supported, q: Tensor, k: Tensor, v: Tensor, layout: Layout, spec: AttentionSpec) -> str:
    """List the arguments that `supported` rejects, separated by commas, or "".

    Each property of the call is tested alone: it replaces the same property of a call that `supported` accepts.
    """
    from .hopper.support import fits_descriptor

    if supported(q, k, v, layout, spec):
        return ""
    found = [name for name, arguments in _one_by_one(q, k, v, layout, spec) if not supported(*arguments)]
    found += [f"address or strides of {name}" for name, x in (("q", q), ("k", k), ("v", v)) if not fits_descriptor(x)]
    return ", ".join(found) or "these properties together"


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, spec: AttentionSpec
) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor, Layout, AttentionSpec]]]:
    """Yield each property, with an otherwise plain call that has it."""
    plain = _shaped((1, 1, _LENGTH, 128), torch.bfloat16)
    usual = BlockLayout.from_mask(torch.ones(1, _LENGTH // 128, _LENGTH // 128) > 0, 128)
    of_all = replace(spec, cu_seqlens=None, query_offset=0, causal=True)

    x = plain.to(q.dtype)
    yield str(q.dtype).removeprefix("torch."), (x, x, x, usual, of_all)
    size = layout.block_size
    blocks = BlockLayout.from_mask(torch.ones(1, -(-_LENGTH // size), -(-_LENGTH // size)) > 0, size)
    yield f"blocks of {size}", (plain, plain, plain, blocks, of_all)
    (*_, dim), (*_, v_dim) = q.shape, v.shape
    x = _shaped((1, 1, _LENGTH, dim), torch.bfloat16)
    values = _shaped((1, 1, _LENGTH, v_dim), torch.bfloat16)
    yield f"head dimensions {dim}, {v_dim}", (x, x, values, usual, of_all)
    if spec.cu_seqlens is not None:
        bounds = torch.tensor([0, _LENGTH], dtype=torch.int32)
        yield "packed documents", (plain, plain, plain, usual, replace(of_all, cu_seqlens=bounds))
    if not spec.causal:
        yield "no causal mask", (plain, plain, plain, usual, replace(of_all, causal=False))
    offset = f"query offset {spec.query_offset}"
    yield offset, (plain, plain, plain, usual, replace(of_all, query_offset=spec.query_offset))
    heads = f"{q.shape[1]} query heads to {k.shape[1]} of keys"
    grouped = [_shaped((1, x.shape[1], _LENGTH, 128), torch.bfloat16) for x in (q, k)]
    yield heads, (grouped[0], grouped[1], grouped[1], usual, of_all)
    long = [_shaped((*x.shape[:3], 128), torch.bfloat16) for x in (q, k)]
    sizes = f"batch, heads, queries {tuple(q.shape[:3])}, keys {k.shape[2]}"
    yield sizes, (long[0], long[1], long[1], replace(layout, block_size=128), of_all)


def _shaped(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Make a tensor of this shape that takes no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")
