"""Copy from the host to a device."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


def to_device(values: Tensor | np.ndarray, device: torch.device | str) -> Tensor:
    """Copy to a device without making the host wait.

    What is there already is returned itself.
    """
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def fields_to_device(record: T, device: torch.device | str) -> T:
    """Copy the tensors of a dataclass, as `to_device`.

    Those of dataclasses in it are copied too.
    """
    assert is_dataclass(record)
    assert not isinstance(record, type)
    moved: dict[str, Any] = {}
    for name in (field.name for field in fields(record)):
        value = getattr(record, name)
        if isinstance(value, Tensor):
            moved[name] = to_device(value, device)
        elif is_dataclass(value):
            moved[name] = fields_to_device(value, device)
    return replace(record, **moved)
