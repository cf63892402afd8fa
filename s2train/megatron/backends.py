"""Which implementations of linear layers, norms and optimizer a run uses."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import Adam
from megatron.core.transformer.spec_utils import ModuleSpec

from s2train.errors import ConfigError
from s2train.megatron.norm import RMSNorm


@dataclass(frozen=True)
class Backend:
    """Building blocks around our core attention.

    Attributes:
        name: as in `backend=`.
        layer_spec: makes a fresh Megatron spec of one transformer layer.
        norm: the final norm's class.
        optimizer: what Megatron's `adam` stands for here, for the log.
    """

    name: str
    layer_spec: Callable[[], ModuleSpec]
    norm: type
    optimizer: str


def choose_backend(name: str) -> Backend:
    """`auto` and `local` are Megatron's own layers on torch; its Adam is the best one installed.

    Raises:
        ConfigError: another backend. transformer-engine's layers are not verified yet.
    """
    if name not in ("auto", "local"):
        raise ConfigError("backend", name, "no such backend, or not verified yet", "Use backend=local")
    return Backend("local", _local_layer_spec, RMSNorm, f"{Adam.__module__}.{Adam.__qualname__}")


def _local_layer_spec() -> ModuleSpec:
    # Megatron hands out shared objects; a layer of ours must not change everybody's.
    spec = copy.deepcopy(get_gpt_layer_local_spec(normalization="RMSNorm"))
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    return spec
