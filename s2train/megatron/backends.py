"""Which implementations of linear layers, norms, SwiGLU and optimizer a run uses."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import Adam
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec

from s2train.config import PretrainConfig
from s2train.errors import ConfigError
from s2train.liger import INSTALL as LIGER
from s2train.liger import choose_elementwise, liger_problem
from s2train.megatron.norm import RMSNorm
from s2train.te import INSTALL, te_problem


@dataclass(frozen=True)
class Backend:
    """Building blocks around our core attention.

    Attributes:
        name: as in `backend=`.
        layer_spec: makes a fresh Megatron spec of one transformer layer.
        norm: the final norm's class.
        optimizer: what Megatron's `adam` stands for here, for the log.
        fuses_rotation: whether Megatron has a fused kernel for rotary embeddings with it.
        mlp: the class to make of Megatron's MLP; None: left as it is.
    """

    name: str
    layer_spec: Callable[[], ModuleSpec]
    norm: type
    optimizer: str
    fuses_rotation: bool = False
    mlp: type[MLP] | None = None


def backend_of(cfg: PretrainConfig) -> Backend:
    """What a run's `backend` and `elementwise` come to on this process's device."""
    return choose_backend(cfg.backend, choose_elementwise(cfg, own_capability()))


def own_capability() -> tuple[int, int] | None:
    """Compute capability of this process's GPU; None on a CPU."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def choose_backend(name: str, elementwise: str = "torch") -> Backend:
    """`local`: Megatron's own layers on torch. `te`: transformer-engine's. `auto`: te where it works on a GPU.

    Megatron's Adam is the best one installed, whatever the backend: transformer-engine's, apex's, torch's.

    Args:
        elementwise: torch or liger.

    Raises:
        ConfigError: te or liger, and it is missing or broken; another name.
    """
    optimizer = f"{Adam.__module__}.{Adam.__qualname__}"
    if name == "te" and (problem := te_problem()) is not None:
        raise ConfigError("backend", name, problem, INSTALL)
    if name == "te" or (name == "auto" and torch.cuda.is_available() and te_problem() is None):
        from megatron.core.extensions.transformer_engine import TENorm  # no class where it is not installed

        return Backend("te", _te_layer_spec, TENorm, optimizer, torch.cuda.is_available(), _fused_mlp(elementwise))
    if name in ("auto", "local"):
        mlp, norm = _fused_mlp(elementwise), _fused_norm(elementwise)
        return Backend("local", partial(_local_layer_spec, norm), norm, optimizer, mlp=mlp)
    raise ConfigError("backend", name, "no such backend", "Use backend=auto, local or te")


def _fused_mlp(elementwise: str) -> type[MLP] | None:
    if elementwise != "liger":
        return None
    if (problem := liger_problem()) is not None:
        raise ConfigError("elementwise", elementwise, problem, f"{LIGER}, or set elementwise=torch")
    from s2train.megatron.fused import LigerMLP  # no class where it is not installed

    return LigerMLP


def _fused_norm(elementwise: str) -> type[RMSNorm]:
    if elementwise != "liger":
        return RMSNorm
    from s2train.megatron.fused import LigerRMSNorm

    return LigerRMSNorm


def _local_layer_spec(norm: type) -> ModuleSpec:
    # Megatron hands out shared objects; a layer of ours must not change everybody's.
    spec = copy.deepcopy(get_gpt_layer_local_spec(normalization="RMSNorm"))
    spec.submodules.input_layernorm = norm
    spec.submodules.pre_mlp_layernorm = norm
    return spec


def _te_layer_spec() -> ModuleSpec:
    """Norms are parts of the linear layers after them; the config's `normalization` says which."""
    return copy.deepcopy(get_gpt_layer_with_transformer_engine_spec())


def sum_gradients_in_place(model: torch.nn.Module) -> None:
    """Have transformer-engine's linear layers add weight gradients to Megatron's fp32 buffers in the product itself.

    Megatron's own setting for that wants apex for the output layer, which is not transformer-engine's.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]
