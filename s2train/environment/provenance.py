"""Records the environment of a result, for the file that holds it."""

import platform
from datetime import date
from typing import Any

import torch

from s2train.environment.versions import versions
from s2train.kernels.versions import installed_version

_MAY_LACK = ("triton", "megatron-core", "transformer-engine")


def environment() -> dict[str, Any]:
    """Return date, device and versions; None for packages not installed."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    found: dict[str, str | None] = {**dict.fromkeys(_MAY_LACK), **versions()}
    found["apex"] = installed_version("apex")
    return {"date": date.today().isoformat(), "device": device, **found}
