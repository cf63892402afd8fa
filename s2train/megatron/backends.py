"""Which implementations of linear layers, norms and optimizer a run uses."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import Adam
from megatron.core.transformer.spec_utils import ModuleSpec

from s2train.errors import ConfigError
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
    """

    name: str
    layer_spec: Callable[[], ModuleSpec]
    norm: type
    optimizer: str
    fuses_rotation: bool = False


def choose_backend(name: str) -> Backend:
    """`local`: Megatron's own layers on torch. `te`: transformer-engine's. `auto`: te where it works on a GPU.

    Megatron's Adam is the best one installed, whatever the backend: transformer-engine's, apex's, torch's.

    Raises:
        ConfigError: te, and it is missing or broken; another name.
    """
    optimizer = f"{Adam.__module__}.{Adam.__qualname__}"
    if name == "te" and (problem := te_problem()) is not None:
        raise ConfigError("backend", name, problem, INSTALL)
    if name == "te" or (name == "auto" and torch.cuda.is_available() and te_problem() is None):
        from megatron.core.extensions.transformer_engine import TENorm  # no class where it is not installed

        return Backend("te", _te_layer_spec, TENorm, optimizer, fuses_rotation=torch.cuda.is_available())
    if name in ("auto", "local"):
        return Backend("local", _local_layer_spec, RMSNorm, optimizer)
    raise ConfigError("backend", name, "no such backend", "Use backend=auto, local or te")


def _local_layer_spec() -> ModuleSpec:
    # Megatron hands out shared objects; a layer of ours must not change everybody's.
    spec = copy.deepcopy(get_gpt_layer_local_spec(normalization="RMSNorm"))
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
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
