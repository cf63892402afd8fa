"""Run Megatron-core on a CPU.

Megatron-core names CUDA throughout (`device="cuda"`, `torch.cuda.current_device()`, pinned memory, the CUDA
generator). `install` redirects those names to the CPU if torch has no CUDA device, and otherwise does nothing. It
affects the whole process: call it when a program starts, never from a library.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
# On a CPU streams and synchronisation do nothing; memory statistics are zero.
_NO_OPS = ("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats", "ipc_collect")
_ZEROS = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")


class _NullStream:
    """Replaces every CUDA stream: work on a CPU is always in order."""

    cuda_stream = 0

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _NullStream)

    __hash__ = object.__hash__


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


_REWRITTEN = {torch.Tensor.cuda, torch.Tensor.pin_memory, torch.Tensor.type, torch.Tensor.to}  # without keywords too


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites CUDA devices in the arguments of torch's functions."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if not kwargs and func not in _REWRITTEN:  # most calls
            return func(*args)
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizer sorts parameters by comparing with "torch.cuda.FloatTensor".
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs["device"] = _CPU
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


def install() -> bool:
    """Redirect CUDA to the CPU if there is no CUDA device.

    Returns whether CUDA is redirected. Calling it again is safe.
    """
    if torch.cuda.is_available():
        return False
    if isinstance(torch.cuda.current_stream, _Answer):
        return True
    for name in _NO_OPS:
        setattr(torch.cuda, name, _Answer(lambda: None))
    for name in _ZEROS:
        setattr(torch.cuda, name, _Answer(lambda: 0))
    null = _NullStream()
    torch.cuda.current_device = _Answer(lambda: _CPU)
    torch.cuda.current_stream = torch.cuda.default_stream = _Answer(lambda: null)
    for name in ("range_push", "range_pop"):
        setattr(torch.cuda.nvtx, name, _Answer(lambda: None))
    _share_cpu_generator()
    _CudaMeansCpu().__enter__()
    return True


class _Answer:
    """A function of any arguments that ignores them."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self._answer = answer

    def __call__(self, *args: object, **kwargs: object) -> Any:
        return self._answer()


def _share_cpu_generator() -> None:
    """Make Megatron's RNG tracker use the CPU generator's states."""
    import megatron.core.tensor_parallel.random as megatron_random

    def seed(value: int) -> None:
        torch.default_generator.manual_seed(value)

    def get_state(*args: object, **kwargs: object) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: object, **kwargs: object) -> None:
        torch.set_rng_state(state)

    for name in ("manual_seed", "manual_seed_all"):
        setattr(torch.cuda, name, seed)
    for module in (torch.cuda, torch.cuda.random):
        setattr(module, "get_rng_state", get_state)  # noqa: B010 (a module to the type checker)
        setattr(module, "set_rng_state", set_state)  # noqa: B010
    megatron_random._set_cuda_rng_state = set_state
