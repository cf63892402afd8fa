"""A checkpoint of one backend in a run of another.

Weights have the same names: Megatron names a norm after the linear layer that transformer-engine makes it a part of.
Two things differ: extra state, which transformer-engine's norms have and torch's don't, and what an Adam keeps in its
parameter groups.
"""

from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.optimizer import MegatronOptimizer

_SUFFIX = "_extra_state"


def load_without_foreign_extra_state(state: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    """Megatron's loading of a sharded state dict; extra state that the checkpoint has none of is loaded as None.

    The recipes that s2train takes keep nothing in it.
    """
    wanted = [
        (section, name, value.unique_key)
        for section, values in state.items()
        if isinstance(values, dict)
        for name, value in values.items()
        if isinstance(value, ShardedObject) and str(name).endswith(_SUFFIX)
    ]
    foreign: list[tuple[str, str]] = []
    if wanted:
        there = load_sharded_metadata(checkpoint)
        known = {value.unique_key for value in there.values() if isinstance(value, ShardedObject)}
        foreign = [(section, name) for section, name, key in wanted if key not in known]
    dropped = set(foreign)
    kept = {
        section: (
            {name: value for name, value in values.items() if (section, name) not in dropped}
            if isinstance(values, dict)
            else values
        )
        for section, values in state.items()
    }
    # Ranks ask for their own parts of the optimizer's state alone (`own_state`), not for all of every tensor.
    loaded = dist_checkpointing.load(kept, checkpoint, validate_access_integrity=False)
    for section, name in foreign:
        loaded[section][name] = None
    return loaded


def fit_groups(optimizer: MegatronOptimizer, loaded: Any) -> None:
    """Give loaded optimizer state what this Adam keeps in its groups and the one that saved did not, and its count of
    steps where this one has it: torch's in the parameters' state, others' in the group.

    Args:
        loaded: as dist_checkpointing gives it; changed in place.
    """
    inner = getattr(optimizer, "chained_optimizers", [optimizer])[0].optimizer
    _fit(loaded, inner.defaults, is_torch=isinstance(inner, torch.optim.AdamW))


def _fit(loaded: Any, defaults: dict[str, Any], is_torch: bool) -> None:
    if isinstance(loaded, list | tuple):
        for value in loaded:
            _fit(value, defaults, is_torch)
    if not isinstance(loaded, dict):
        return
    groups, state = loaded.get("param_groups", []), loaded.get("state")
    if groups and isinstance(state, dict):  # the plain optimizer's; the distributed one keeps the step in its groups
        if is_torch and "common_step" not in state and "step" in groups[0]:
            state["common_step"] = torch.tensor(float(groups[0]["step"]))
        elif not is_torch and "common_step" in state:
            step = int(state.pop("common_step"))
            for group in groups:
                group["step"] = step
    for group in groups:
        for name, value in defaults.items():
            group.setdefault(name, value)
        if not is_torch and group.get("step") is not None:
            group["step"] = int(group["step"])  # torch's is a float
    for value in loaded.values():
        _fit(value, defaults, is_torch)
