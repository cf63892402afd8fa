"""Checks what `parallel.tp_comm_overlap` needs."""

from s2train.config import PretrainConfig
from s2train.environment.hardware import Hardware
from s2train.environment.transformer_engine import uses_te
from s2train.errors import ConfigError

_NVLINK = 100e9  # bytes/s: every NVLink that joins all GPUs of a machine is faster, and PCIe is slower


def can_overlap(hardware: Hardware) -> bool:
    """Return whether ranks on this hardware may wait in each other's memory."""
    return hardware.rates is None or hardware.rates.link >= _NVLINK


def check_overlap(cfg: PretrainConfig, world_size: int, hardware: Hardware) -> None:
    """Check `parallel.tp_comm_overlap` for planned GPUs.

    Raises:
        ConfigError: tensor parallel ranks aren't sequence parallel, layers are transformer-engine's, GPUs of this name
            are linked by PCIe, over which ranks can't wait in each other's memory, or a group of tensor parallel ranks
            is spread over machines.
    """
    name, parallel, remedy = "parallel.tp_comm_overlap", cfg.parallel, "parallel.tp_comm_overlap=false"
    if parallel.tp == 1 or not parallel.tp_comm_overlap:
        return
    if not parallel.sequence_parallel:
        problem = "only communication of sequence parallel ranks overlaps"
        raise ConfigError(name, True, problem, f"Set parallel.sequence_parallel=true, or {remedy}")
    if uses_te(cfg, hardware):
        problem = "transformer-engine's layers don't take it: they have another overlap, which s2train doesn't turn on"
        raise ConfigError(name, True, problem, f"Set layer_backend=local fp8=none, or {remedy}")
    if not can_overlap(hardware):
        problem = f"{hardware.name} is linked by PCIe, over which ranks can't wait in each other's memory"
        raise ConfigError(name, True, problem, f"Set {remedy}")
    of_machine = hardware.per_machine
    if of_machine is not None and world_size > of_machine and of_machine % parallel.tp:
        gpus = "1 GPU" if of_machine == 1 else f"{of_machine} GPUs"
        problem = f"ranks wait in each other's memory, and machines of {gpus} don't hold whole groups of"
        problem += f" parallel.tp={parallel.tp} ranks"
        raise ConfigError(name, True, problem, f"Set {remedy}, or parallel.tp to a divisor of {of_machine}")
