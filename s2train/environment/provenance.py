"""Records the environment of a result, for the file that holds it."""

import platform
from collections.abc import Sequence
from datetime import date
from typing import Any

import torch

from s2train.environment.versions import versions
from s2train.kernels.provenance import origin
from s2train.kernels.versions import installed_version

_MAY_LACK = ("triton", "megatron-core", "transformer-engine")


def environment() -> dict[str, Any]:
    """Return date, device and versions; None for packages not installed."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    found: dict[str, str | None] = {**dict.fromkeys(_MAY_LACK), **versions()}
    found["apex"] = installed_version("apex")
    return {"date": date.today().isoformat(), "device": device, **found}


def timed_on(
    program: str, arguments: Sequence[str] | None, device: torch.device, packages: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what a file of timings begins with: date, command, device, versions.

    Args:
        program: module below s2train, as in `python -m s2train.PROGRAM`.
        arguments: None: this process's.
        packages: further ones that are timed; their versions are None where they are absent.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    found = versions() | {package: installed_version(package) for package in packages}
    return {**origin(program, arguments), "device": name, "versions": found}
