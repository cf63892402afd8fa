"""Telling NVIDIA's apex from the unrelated package of that name on PyPI, without importing either.

What s2train has of apex: FusedAdam and the fused norms of gradients, which Megatron takes by itself where
transformer-engine brings none, and weight gradients summed in place. Its RMSNorm is not taken: torch's is one kernel
too.
"""

from importlib.util import find_spec
from pathlib import Path

from s2train.errors import ConfigError

_BUILD = "build NVIDIA's from source (https://github.com/NVIDIA/apex) with its CUDA extensions, or do without"


def apex_available() -> bool:
    """Whether NVIDIA's apex is installed with its CUDA extensions; Megatron then takes its optimizer.

    Raises:
        ConfigError: a package named apex is there that Megatron would take for NVIDIA's.
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


def fuses_gradient_sums() -> bool:
    """Whether apex's extension is there that adds a weight gradient to an fp32 buffer within the product."""
    return apex_available() and find_spec("fused_weight_gradient_mlp_cuda") is not None
