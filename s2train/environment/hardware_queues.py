"""Makes communication on GPUs start in the order of calls.

Megatron calls communication first and then the products that hide it. With several hardware queues the products can
start first and take all multiprocessors; communication then waits for their end.
"""

import os

from s2train.config import ParallelConfig
from s2train.environment.hardware import hides_gpus, may_have_gpu

NAME = "CUDA_DEVICE_MAX_CONNECTIONS"
_ORDERED = "1"
# The first sets this one too: exchanges by copy engines would then wait for each other, and other copies for them.
COPIES = "CUDA_DEVICE_MAX_COPY_CONNECTIONS"
_CUDAS_DEFAULT = "8"


def order_communication(parallel: ParallelConfig) -> str | None:
    """Set one hardware queue where needed, unless the user set a number.

    Copies keep several where tensor parallel ranks exchange rows by them.

    Call before anything asks CUDA's driver, which reads the variable once. Tensor and context parallel ranks need it on
    GPUs before Blackwell (validate_args in Megatron-LM's megatron/training/arguments.py). Later GPUs work with it too.

    Returns:
        What the user's value loses, or None.
    """
    if parallel.tp == parallel.cp == 1 or hides_gpus() or not may_have_gpu():
        return None
    value = os.environ.setdefault(NAME, _ORDERED)
    if parallel.tp_comm_overlap:
        os.environ.setdefault(COPIES, _CUDAS_DEFAULT)
    if value == _ORDERED or parallel.tp == 1:
        return None
    return (
        f"{NAME}={value} is kept: on GPUs before Blackwell, communication of parallel.tp={parallel.tp} may start after"
        f" the products that should hide it, which makes steps longer. Unset it, or set {_ORDERED}"
    )


def queues() -> str | None:
    """Format the numbers of queues; None if CUDA's default applies."""
    return " ".join(f"{name}={os.environ[name]}" for name in (NAME, COPIES) if name in os.environ) or None
