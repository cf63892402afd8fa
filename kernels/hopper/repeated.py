"""Repeat the launches of an earlier call with other tensors.

A call like an earlier one (same layout, shapes, strides and settings) has the same launches but for addresses. What
they need is computed once: arguments, descriptors, and what Triton's Python does before each launch. A repeated call
makes its outputs and passes addresses to the launcher that Triton has compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from .. import spec as specs
from ..launch import watched
from ..spec import Format, in_format
from .support import TRITON

Launched = tuple[Any, tuple[int, int, int], Sequence[Any]]  # compiled kernel, grid, arguments


class RepeatedLaunch:
    """A launch that is repeated with other addresses and nothing else changed."""

    def __init__(self, launched: Launched, moving: Sequence[Tensor | None]) -> None:
        """Fix a launch of a kernel that `can_repeat` accepts.

        Args:
            moving: tensors whose addresses each call passes, in this order and aligned alike; other tensors among the
                arguments are kept and passed again. None: no such tensor.
        """
        compiled, grid, arguments = launched
        run = compiled.run
        launcher = _launcher(run)
        assert launcher is not None
        self._launcher = launcher
        self._spread = _spreads_arguments()
        utils = driver.active.utils
        self._encode = utils.fill_tma_descriptor if self._spread else utils.fill_tma_descriptor_tiled
        nothing = (None, None, None)  # launch metadata and hooks, which only profilers read
        scratch = (None, None)
        after: tuple[Any, ...] = (compiled.function, run.launch_cooperative_grid, run.launch_pdl)
        if self._spread:
            after += (*scratch, compiled.packed_metadata, *nothing)
        else:
            after += (compiled.packed_metadata, *nothing, *scratch, run.arg_annotations, run.kernel_signature)
        self._grid, self._after_stream = grid, after
        self._kept: list[Tensor] = []  # alive, so that their addresses stay theirs
        self._addresses: list[tuple[int, int]] = []
        self._maps: list[tuple[int, int, tuple[Any, ...]]] = []
        self._arguments: list[Any] = []
        maps = iter(compiled.metadata.tensordesc_meta or ())
        for argument in arguments:
            at = len(self._arguments)
            if isinstance(argument, TensorDescriptor):
                place = _place(argument.base, moving)
                assert place is not None
                self._maps.append((at, place, _encoding(argument, next(maps))))
                self._arguments += [None, *argument.shape, *argument.strides]
                continue
            place = _place(argument, moving)
            if place is not None:
                self._addresses.append((at, place))
                argument = None
            elif isinstance(argument, Tensor):
                self._kept.append(argument)
                argument = argument.data_ptr()
            self._arguments.append(argument)

    def __call__(self, stream: int, addresses: Sequence[int]) -> None:
        arguments = self._arguments.copy()  # threads may launch at the same time
        for at, place in self._addresses:
            arguments[at] = addresses[place]
        encode = self._encode
        for at, place, encoding in self._maps:
            arguments[at] = encode(addresses[place], *encoding)
        if self._spread:
            self._launcher(*self._grid, stream, *self._after_stream, *arguments)
        else:
            self._launcher(*self._grid, stream, *self._after_stream, arguments)


class RepeatedForward:
    """A forward whose launch is repeated."""

    def __init__(
        self, launched: Launched, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, format: Format
    ) -> None:
        """Take the first call's launch and tensors.

        q, k, v and out are views [b, h, s, d].
        """
        self._launch = RepeatedLaunch(launched, (q, k, v, out, lse))
        self._device = _Device(q.device)
        self._dtype = q.dtype
        self._out, self._lse = in_format(tuple(out.shape), format), tuple(lse.shape)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the output in the call's format, and the log-sum-exp.

        Return None if these tensors or the process need another launch: an address that is not aligned, another current
        device, or a profiler.
        """
        device = self._device
        q_at, k_at, v_at = q.data_ptr(), k.data_ptr(), v.data_ptr()
        if (q_at | k_at | v_at) % 16 or not device.ready():
            return None
        out = specs.empty(self._out, self._dtype, device.device)
        lse = specs.empty(self._lse, torch.float32, device.device)
        self._launch(device.stream(), (q_at, k_at, v_at, out.data_ptr(), lse.data_ptr()))
        return out, lse


class RepeatedBackward:
    """A backward whose launches are repeated, in order."""

    def __init__(self, launched: Sequence[Launched], moving: Sequence[Tensor | None], format: Format) -> None:
        """Take the first call's launches and tensors.

        Args:
            moving: q, k, v, output, log-sum-exp, both gradients, log-sum-exp in base 2, delta, accumulator of dq, dq,
                dk, dv and parts; views [b, h, s, d] where they have a head dimension.
        """
        q, _, _, _, _, _, _, lse2, _, acc, dq, dk, dv, parts = moving
        assert q is not None
        assert lse2 is not None
        assert acc is not None
        self._launches = [RepeatedLaunch(one, moving) for one in launched]
        self._device, self._dtype = _Device(q.device), q.dtype
        self._rows, self._acc = lse2.numel(), tuple(acc.shape)
        self._gradients = [in_format(tuple(x.shape), format) for x in (dq, dk, dv) if x is not None]
        self._parts = None if parts is None else tuple(parts.shape)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the gradients in the call's format, or None as the forward."""
        device = self._device
        given = [x.data_ptr() for x in (q, k, v, out, lse, dout)]
        given.append(0 if dlse is None else dlse.data_ptr())
        if any(address % 16 for address in given) or not device.ready():
            return None
        empty, on = specs.empty, device.device
        dq, dk, dv = (empty(shape, self._dtype, on) for shape in self._gradients)
        lse2 = empty((2, self._rows), torch.float32, on)
        acc = torch.zeros(self._acc, dtype=torch.float32, device=on)
        parts = None if self._parts is None else empty(self._parts, torch.float32, on)
        lse2_at = lse2.data_ptr()
        addresses = (
            *given, lse2_at, lse2_at + 4 * self._rows, acc.data_ptr(), dq.data_ptr(), dk.data_ptr(), dv.data_ptr(),
            0 if parts is None else parts.data_ptr(),
        )  # fmt: skip
        stream = device.stream()
        for launch in self._launches:
            launch(stream, addresses)
        return dq, dk, dv


class _Device:
    """A device, with what is asked before each launch on it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._index = device, device.index
        self._current_stream = driver.active.get_current_stream

    def ready(self) -> bool:
        """Return whether launches can be repeated now.

        It must be the current device, and no profiler listen.
        """
        return (self._index is None or self._index == torch.cuda.current_device()) and not watched()

    def stream(self) -> int:
        """Return the current stream's handle."""
        stream: int = self._current_stream(self._index)
        return stream


def can_repeat(launched: Sequence[Launched], moving: Sequence[Tensor | None]) -> bool:
    """Return whether these launches can be repeated.

    Their launchers must be those of a known Triton, without scratch memory or instrumentation. Of the moving tensors
    each must be another object, by which it is found among the arguments, and aligned to 16 bytes.
    """
    tensors = [x for x in moving if x is not None]
    return (
        len({id(x) for x in tensors}) == len(tensors)
        and all(x.data_ptr() % 16 == 0 for x in tensors)
        and all(_known(compiled) for compiled, _, _ in launched)
    )


def _known(compiled: Any) -> bool:
    run, maps = compiled.run, getattr(compiled.metadata, "tensordesc_meta", None) or ()
    return (
        triton.__version__.startswith(TRITON)
        and _launcher(run) is not None
        and run.global_scratch_size == run.profile_scratch_size == 0
        and not getattr(run, "gsan_enabled", False)  # which adds arguments; since 3.8
        and not any(of_map is None or of_map["fp4_padded"] for of_map in maps)
    )


def _spreads_arguments() -> bool:
    """Return whether launchers take a kernel's arguments one by one.

    Those of Triton 3.6 do; later ones take a list.
    """
    return triton.__version__.startswith("3.6.")


def _launcher(run: Any) -> Callable[..., None] | None:
    """Return the compiled launcher, which Triton wraps where a kernel takes descriptors."""
    found: Any = getattr(run, "launch", None)
    if isinstance(found, FunctionType):
        cells = dict(zip(found.__code__.co_freevars, found.__closure__ or (), strict=True))
        found = cells["launcher"].cell_contents if "launcher" in cells else None
    launcher: Callable[..., None] | None = found
    return launcher


def _encoding(argument: TensorDescriptor, of_map: dict[str, Any]) -> tuple[Any, ...]:
    """Return a tensor map's properties, except its address.

    They are those that Triton's `make_tensordesc_arg` passes.
    """
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    dtype = TMA_DTYPE_DEVICE_TO_HOST[of_map["elem_type"]]
    no_padding = 0
    return (
        of_map["swizzle"], of_map["elem_size"], dtype, of_map["block_size"], argument.shape, argument.strides,
        no_padding,
    )  # fmt: skip


def _place(x: Any, moving: Sequence[Tensor | None]) -> int | None:
    """Return the index of this very tensor; None for anything else."""
    return next((place for place, y in enumerate(moving) if x is y), None) if isinstance(x, Tensor) else None
