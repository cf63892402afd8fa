"""Loads a checkpoint of one backend into a run with another.

Weights have the same names: Megatron names a norm after the linear layer into which transformer-engine fuses it. Two
things differ: extra state, which only transformer-engine's norms have, and the entries of Adam's parameter groups. One
of these, `fused`, chooses among torch's kernels and depends on the device.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer

from s2train.megatron.optimizer_state import optimizer_parts

_SUFFIX = "_extra_state"


def load_without_foreign_extra_state(state: dict[str, Any], checkpoint: Path, known: Collection[str]) -> dict[str, Any]:
    """Load a sharded state dict through Megatron.

    Extra state missing from the checkpoint becomes None. The FP8 recipes that s2train supports store nothing in it.

    Args:
        known: names of the checkpoint's tensors and objects.
    """
    wanted = [
        (section, name, value.unique_key)
        for section, values in state.items()
        if isinstance(values, dict)
        for name, value in values.items()
        if isinstance(value, ShardedObject) and str(name).endswith(_SUFFIX)
    ]
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
    # A rank requests only its own part of the optimizer's state (`megatron.local_optimizer_state`), so Megatron's
    # check that all parts are requested would fail.
    loaded = dist_checkpointing.load(kept, str(checkpoint), validate_access_integrity=False)
    for section, name in foreign:
        loaded[section][name] = None
    return loaded


def convert_param_groups(optimizer: MegatronOptimizer, loaded: Any) -> None:
    """Convert loaded parameter groups to the form that this Adam expects.

    Adds the entries that this Adam has and the one that saved does not, keeps its choice among torch's kernels, and
    moves the step count: torch's Adam keeps it in the parameters' state, others in the group.

    Args:
        loaded: optimizer state from dist_checkpointing; changed in place.
    """
    inner = [part.optimizer for part in optimizer_parts(optimizer)]
    kinds = {type(one) for one in inner}
    # Megatron numbers the states of several; those of one kind, such as Adam's of several chunks, convert alike
    states = [loaded] if len(kinds) == 1 else [loaded[number] for number in range(len(inner))]
    for one, state in zip(inner, states, strict=False):
        _convert(state, one.defaults, is_torch=isinstance(one, torch.optim.AdamW))


def _convert(loaded: Any, defaults: dict[str, Any], is_torch: bool) -> None:
    if isinstance(loaded, list | tuple):
        for value in loaded:
            _convert(value, defaults, is_torch)
    if not isinstance(loaded, dict):
        return
    groups, state = loaded.get("param_groups", []), loaded.get("state")
    if groups and isinstance(state, dict):  # plain optimizer; the distributed one keeps the step in its groups
        if is_torch and "common_step" not in state:  # Megatron leaves a step of 0 out
            state["common_step"] = torch.tensor(float(groups[0].get("step", 0)))
        elif not is_torch and "common_step" in state:
            step = int(state.pop("common_step"))
            for group in groups:
                group["step"] = step
    for group in groups:
        for name, value in defaults.items():
            group.setdefault(name, value)
        if "fused" in defaults:
            group["fused"] = defaults["fused"]
        if not is_torch and group.get("step") is not None:
            group["step"] = int(group["step"])  # torch's is a float
    for value in loaded.values():
        _convert(value, defaults, is_torch)
