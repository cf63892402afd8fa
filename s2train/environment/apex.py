"""Distinguishes NVIDIA's apex from PyPI's unrelated package of that name.

Neither is imported. s2train uses apex's FusedAdam and fused gradient norms, which Megatron selects by itself if
transformer-engine has none, and the accumulation of weight gradients in place. It doesn't use apex's RMSNorm: torch's
is one kernel too.
"""

from importlib.util import find_spec
from pathlib import Path

from s2train.errors import ConfigError

_BUILD = "build NVIDIA's from source (https://github.com/NVIDIA/apex) with its CUDA extensions, or run without it"


def apex_available() -> bool:
    """Whether NVIDIA's apex is installed with CUDA extensions.

    Megatron then uses its optimizer.

    Raises:
        ConfigError: another package named apex is installed, which Megatron would mistake for NVIDIA's.
    """
    spec = find_spec("apex")
    if spec is None:
        return False
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    where = ", ".join(map(str, folders)) or spec.origin
    if not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        raise ConfigError(
            "apex",
            where,
            "it is not NVIDIA's apex: it has no apex.optimizers.FusedAdam",
            f"pip uninstall apex; {_BUILD}",
        )
    if find_spec("amp_C") is None:
        raise ConfigError(
            "apex",
            where,
            "it was built without CUDA extensions (no module amp_C), so its optimizer can't run",
            f"pip uninstall apex; {_BUILD}",
        )
    return True
