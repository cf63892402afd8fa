"""Recomputes a norm's output in the backward pass, instead of saving it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Module


def recompute_output(norm: Module, linear: Module) -> None:
    """Make `linear` recompute its input, the output of `norm`, in the backward.

    The norm's own backward keeps its input anyway. Megatron's `recompute_modules=["layernorm"]` is not used: it raises
    NameError where transformer-engine is not installed, and 0.19 compiles an extension for it.
    """
    recomputation = _Recomputation()
    norm.register_forward_hook(recomputation.after_norm)
    linear.register_forward_pre_hook(recomputation.before_linear)
    linear.register_forward_hook(recomputation.after_linear, always_call=True)


class _Recomputation:
    """Hooks of a norm and the linear layer called after it."""

    def __init__(self) -> None:
        self._hooks: saved_tensors_hooks | None = None  # for the next call of the linear layer
        self._entered = False

    def after_norm(self, norm: Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._hooks = _saving_input(norm, inputs[0].detach(), output)

    def before_linear(self, linear: Module, inputs: tuple[Any, ...]) -> None:
        if self._hooks is not None:
            self._hooks.__enter__()
            self._entered = True

    def after_linear(self, linear: Module, inputs: tuple[Any, ...], output: Any) -> None:
        hooks, self._hooks = self._hooks, None
        if self._entered:
            assert hooks is not None
            self._entered = False
            hooks.__exit__()


def _saving_input(norm: Module, x: Tensor, output: Tensor) -> saved_tensors_hooks:
    """Return hooks that save nothing in place of `output = norm(x)`."""
    assert output.is_contiguous()
    where, size = output.data_ptr(), output.numel()

    def pack(tensor: Tensor) -> Tensor | torch.Size:
        is_output = (tensor.data_ptr(), tensor.numel()) == (where, size) and tensor.is_contiguous()
        return tensor.shape if is_output else tensor

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            found: Tensor = norm.forward(x).view(packed)
        return found

    return saved_tensors_hooks(pack, unpack)
