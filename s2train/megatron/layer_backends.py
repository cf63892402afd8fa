"""Choose the run's linear layers, norms, sums, SwiGLU and rotation."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec

from s2train.config import PretrainConfig
from s2train.environment.liger import INSTALL as LIGER
from s2train.environment.liger import ROTATION, SPLIT, SUMS, SWIGLU, liger_operations, liger_problem
from s2train.environment.transformer_engine import INSTALL, te_problem, uses_te_here
from s2train.errors import ConfigError
from s2train.megatron.norm import HeadNorm, RMSNorm


@dataclass(frozen=True)
class Backend:
    """Building blocks around our core attention.

    Attributes:
        name: as in `layer_backend=`.
        layer_spec: makes a new Megatron spec of one transformer layer, with `model.qk_norm` or without.
        norm: class of the final norm.
        fuses_rotation: whether Megatron has a fused rotary embedding kernel with this backend.
        mlp: class to convert Megatron's MLP to; None: unchanged.
        fuses_sums: whether norms are `SummingRMSNorm`, which are to be given the sums before them.
    """

    name: str
    layer_spec: Callable[[bool], ModuleSpec]
    norm: type
    fuses_rotation: bool = False
    mlp: type[MLP] | None = None
    fuses_sums: bool = False


def backend_of(cfg: PretrainConfig) -> Backend:
    """Resolve a run's `layer_backend` and `elementwise` for this process's device."""
    return choose_backend(cfg.layer_backend, liger_operations(cfg, own_capability(), uses_te_here(cfg.layer_backend)))


def own_capability() -> tuple[int, int] | None:
    """Return the compute capability of this process's GPU; None on a CPU."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def choose_backend(name: str, liger: frozenset[str] = frozenset()) -> Backend:
    """Choose the layer backend by name.

    `local` is Megatron's own layers on torch. `te` is transformer-engine's. `auto` is te if it works on a GPU, else
    local.

    Args:
        liger: those of `s2train.environment.liger.OPERATIONS` that Liger-Kernel computes.
    Raises:
        ConfigError: te or Liger-Kernel is missing or broken, or the name is unknown.
    """
    if name == "te" and (problem := te_problem()) is not None:
        raise ConfigError("layer_backend", name, problem, INSTALL)
    mlp = _liger_mlp(liger)
    if uses_te_here(name):
        from megatron.core.extensions.transformer_engine import TENorm  # not defined where it is not installed

        return Backend("te", _te_layer_spec, TENorm, torch.cuda.is_available(), mlp)
    if name in ("auto", "local"):
        norm = _norm(liger)
        make_spec = partial(_local_layer_spec, _rotating_attention(liger), norm)
        return Backend("local", make_spec, norm, mlp=mlp, fuses_sums=SUMS in liger)
    raise ConfigError("layer_backend", name, "unknown backend", "Use layer_backend=auto, local or te")


def _liger_mlp(liger: frozenset[str]) -> type[MLP] | None:
    if liger and (problem := liger_problem()) is not None:
        raise ConfigError("elementwise", "liger", problem, f"{LIGER}, or set elementwise=torch")
    if SWIGLU not in liger:
        return None
    from s2train.megatron.fused import LigerMLP  # not importable where it is not installed

    return LigerMLP


def _rotating_attention(liger: frozenset[str]) -> ModuleSpec | None:
    """Return self attention with Liger-Kernel's rotation or ours, or None for Megatron's.

    All layers share the rotation's tables.
    """
    if ROTATION not in liger:
        return None
    from s2train.megatron.rotation import RotatingSelfAttention, Rotation  # not importable where it is not installed

    return ModuleSpec(module=RotatingSelfAttention, params={"rotation": Rotation(), "splits": SPLIT in liger})


def _norm(liger: frozenset[str]) -> type[RMSNorm]:
    if SUMS not in liger:
        return RMSNorm
    from s2train.megatron.summed_norm import SummingRMSNorm  # not importable where it is not installed

    return SummingRMSNorm


def _local_layer_spec(attention: ModuleSpec | None, norm: type[RMSNorm], qk_norm: bool) -> ModuleSpec:
    # Megatron returns shared objects: copy them, so that changes for our layers affect no others.
    spec = copy.deepcopy(get_gpt_layer_local_spec(normalization="RMSNorm"))
    spec.submodules.input_layernorm = norm
    spec.submodules.pre_mlp_layernorm = norm
    own = spec.submodules.self_attention
    if qk_norm:
        own.submodules.q_layernorm = own.submodules.k_layernorm = HeadNorm
    if attention is not None:
        own.module, own.params = attention.module, {**(own.params or {}), **(attention.params or {})}
    return spec


def _te_layer_spec(qk_norm: bool) -> ModuleSpec:
    """Return transformer-engine's layer spec.

    Norms are parts of the linear layers that follow them; the config's `normalization` selects them.
    """
    return copy.deepcopy(get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm))
