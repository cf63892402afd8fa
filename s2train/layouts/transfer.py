"""Copy arrays from the host to a device."""

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray, device: torch.device | str) -> Tensor:
    """Copy to a device without making the host wait.

    On a CPU, return the array itself as a tensor.
    """
    tensor = torch.from_numpy(values)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
