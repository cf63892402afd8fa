"""Which implementations of linear layers, norms, SwiGLU, rotation and optimizer a run uses."""

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
from s2train.environment.liger import INSTALL as LIGER
from s2train.environment.liger import ROTATION, SWIGLU, liger_operations, liger_problem
from s2train.environment.transformer_engine import INSTALL, te_problem, uses_te_here
from s2train.errors import ConfigError
from s2train.megatron.norm import RMSNorm


@dataclass(frozen=True)
class Backend:
    """Building blocks around our core attention.

    Attributes:
        name: as in `layer_backend=`.
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
    return choose_backend(cfg.layer_backend, liger_operations(cfg, own_capability(), uses_te_here(cfg.layer_backend)))


def own_capability() -> tuple[int, int] | None:
    """Compute capability of this process's GPU; None on a CPU."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def choose_backend(name: str, liger: frozenset[str] = frozenset()) -> Backend:
    """`local`: Megatron's own layers on torch. `te`: transformer-engine's. `auto`: te where it works on a GPU.

    Megatron's Adam is the best one installed, whatever the backend: transformer-engine's, apex's, torch's.

    Args:
        liger: of `s2train.environment.liger.OPERATIONS`, those that Liger-Kernel computes.
    Raises:
        ConfigError: te or liger, and it is missing or broken; another name.
    """
    optimizer = f"{Adam.__module__}.{Adam.__qualname__}"
    if name == "te" and (problem := te_problem()) is not None:
        raise ConfigError("layer_backend", name, problem, INSTALL)
    mlp = _liger_mlp(liger)
    if uses_te_here(name):
        from megatron.core.extensions.transformer_engine import TENorm  # no class where it is not installed

        return Backend("te", _te_layer_spec, TENorm, optimizer, torch.cuda.is_available(), mlp)
    if name in ("auto", "local"):
        return Backend("local", partial(_local_layer_spec, _rotating_attention(liger)), RMSNorm, optimizer, mlp=mlp)
    raise ConfigError("layer_backend", name, "no such backend", "Use layer_backend=auto, local or te")


def _liger_mlp(liger: frozenset[str]) -> type[MLP] | None:
    if liger and (problem := liger_problem()) is not None:
        raise ConfigError("elementwise", "liger", problem, f"{LIGER}, or set elementwise=torch")
    if SWIGLU not in liger:
        return None
    from s2train.megatron.fused import LigerMLP  # no class where it is not installed

    return LigerMLP


def _rotating_attention(liger: frozenset[str]) -> ModuleSpec | None:
    """Self attention with Liger-Kernel's rotation, its tables shared by all layers; None: Megatron's."""
    if ROTATION not in liger:
        return None
    from s2train.megatron.rotation import RotatingSelfAttention, Rotation  # no class where it is not installed

    return ModuleSpec(module=RotatingSelfAttention, params={"rotation": Rotation()})


def _local_layer_spec(attention: ModuleSpec | None) -> ModuleSpec:
    # Megatron hands out shared objects; a layer of ours must not change everybody's.
    spec = copy.deepcopy(get_gpt_layer_local_spec(normalization="RMSNorm"))
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    if attention is not None:
        own = spec.submodules.self_attention
        own.module, own.params = attention.module, {**(own.params or {}), **(attention.params or {})}
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
