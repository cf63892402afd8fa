"""What Megatron's transformer-engine layers are built on, in plain torch: for tests of names and wiring on a CPU.

Module and parameter names, extra state (an empty byte tensor) and the optimizer's group-wide `step` are as in
transformer-engine 2.20; its kernels, FP8 and parallelism are not here.
"""

import sys
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

# Parts that Megatron imports names from, and a plain model uses none of.
_UNUSED = ("ops", "router", "permutation", "tensor", "tensor.utils", "graph", "utils")


class _Module(torch.nn.Module):
    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        assert state is None or isinstance(state, torch.Tensor)


class Linear(_Module):
    def __init__(self, in_features: int, out_features: int, init_method: Any, params_dtype: torch.dtype, **kw: Any):
        super().__init__()
        assert kw.get("bias") is False
        self.in_features, self.out_features, self.use_bias = in_features, out_features, False
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype))
        init_method(self.weight)

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        return F.linear(x, self.weight)


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, eps: float, normalization: str, **kw: Any) -> None:
        super().__init__(in_features, out_features, **kw)
        assert normalization == "RMSNorm"
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features, dtype=kw["params_dtype"]))

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        return F.linear(F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps), self.weight)


class RMSNorm(_Module):
    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        hidden_size: int | None = None,  # its old name
        params_dtype: torch.dtype | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.eps, hidden_size = eps, normalized_shape or hidden_size
        assert hidden_size is not None
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=params_dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class FusedAdam(torch.optim.Optimizer):
    """Adam whose step belongs to the group; `bias_correction` is looked up there without a default."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), **kw: Any) -> None:
        defaults = {"lr": lr, "bias_correction": True, "betas": betas, "eps": 1e-8, "weight_decay": 0.0}
        super().__init__(params, defaults | {k: v for k, v in kw.items() if k in defaults})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            assert isinstance(group["step"], int)
            (beta1, beta2), step = group["betas"], group["step"]
            corrections = (1 - beta1**step, 1 - beta2**step) if group["bias_correction"] else (1.0, 1.0)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                root = (state["exp_avg_sq"] / corrections[1]).sqrt() + group["eps"]
                p.addcdiv_(state["exp_avg"] / corrections[0], root, value=-group["lr"])


class FusedSGD(torch.optim.SGD):
    pass


def _scale(chunk: int, overflow: torch.Tensor, tensors: Any, factor: float | torch.Tensor) -> None:
    for source, target in zip(*tensors, strict=True):
        target.copy_(source * factor)


def _l2norm(chunk: int, overflow: torch.Tensor, tensors: Any, per_tensor: bool) -> tuple[torch.Tensor, None]:
    return torch.stack([x.norm() for x in tensors[0]]).norm(), None


def _apply(op: Any, overflow: torch.Tensor, tensors: Any, *args: Any) -> Any:
    return op(2048, overflow, tensors, *args)


def _no_offload(*args: Any, **kwargs: Any) -> tuple[Any, None]:
    return nullcontext(), None


class _SplitAlongDim:
    @staticmethod
    def apply(x: torch.Tensor, dim: int, sizes: list[int]) -> tuple[torch.Tensor, ...]:
        return torch.split(x, sizes, dim)


class _Base(_Module):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("not used")


class _States:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


class _Recipe:
    pass


def _unused(name: str) -> type:
    """Names that Megatron imports and a plain model does not use."""
    if name.startswith("__"):
        raise AttributeError(name)
    return _Base


def install() -> None:
    """Make `import transformer_engine` find this; before Megatron is imported."""
    contents: dict[str, dict[str, Any]] = {
        "": {"__version__": "2.20.2"},
        ".common": {},
        ".common.recipe": {"DelayedScaling": _Recipe, "Format": _Recipe, "Float8CurrentScaling": _Recipe},
        ".pytorch": {
            "Linear": Linear,
            "LayerNormLinear": LayerNormLinear,
            "RMSNorm": RMSNorm,
            "LayerNorm": _Base,
            "DotProductAttention": _Base,
            "GroupedLinear": _Base,
        },
        **{f".pytorch.{name}": {"get_cpu_offload_context": _no_offload} for name in ("cpu_offload", "cpu_offload_v1")},
        ".pytorch.attention": {"_SplitAlongDim": _SplitAlongDim},
        ".pytorch.fp8": {"FP8GlobalStateManager": _States, "fp8_autocast": None, "fp8_model_init": None},
        ".pytorch.distributed": {"CudaRNGStatesTracker": object},
        ".pytorch.float8_tensor": {"Float8Tensor": _Recipe},
        **{f".pytorch.{part}": {} for part in _UNUSED},
        ".pytorch.optimizers": {
            "FusedAdam": FusedAdam,
            "FusedSGD": FusedSGD,
            "multi_tensor_applier": _apply,
            "multi_tensor_scale": _scale,
            "multi_tensor_scale_tensor": _scale,
            "multi_tensor_l2norm": _l2norm,
        },
    }
    for name, values in contents.items():
        module = ModuleType(f"transformer_engine{name}")
        module.__path__ = []  # a package, so that what is missing in it raises ImportError
        module.__dict__.update(values)
        if name.startswith(".pytorch"):
            module.__dict__["__getattr__"] = _unused
        sys.modules[module.__name__] = module
        parent, _, last = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
