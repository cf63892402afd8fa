"""Process groups, device and seeds of a run."""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import PrefixStore, Store

from s2train.config import ParallelConfig
from s2train.megatron import cpu

# Judges, on every rank, whether the ranks of a job go together: (a store that they share, rank, ranks).
StartCheck = Callable[[Store, int, int], None]
_TIMEOUT = timedelta(minutes=30)


def initialize(parallel: ParallelConfig, seed: int, check: StartCheck | None = None) -> torch.device:
    """Join the job that torchrun started (a plain `python` is a job of one) and make Megatron's process groups.

    NCCL where CUDA is, gloo otherwise. Returns the device of this rank. Call `shutdown` at the end.

    Args:
        check: called before there is a process group: NCCL hangs on what it should find.
    """
    on_cpu = cpu.install()
    for name, default in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, default)
    if on_cpu:
        device = torch.device("cpu")
        # Ranks of one machine share its cores; torchrun's own default is one thread each.
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    else:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        store, rank, world_size = _meet()
        if check is not None:
            check(PrefixStore("start", store), rank, world_size)
        torch.distributed.init_process_group(
            backend="gloo" if on_cpu else "nccl",
            store=PrefixStore("job", store),
            rank=rank,
            world_size=world_size,
            timeout=_TIMEOUT,
            device_id=None if on_cpu else device,
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp,
        context_parallel_size=parallel.cp,
    )
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()  # else every stage would draw the same weights
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return device


def _meet() -> tuple[Store, int, int]:
    """A store that the ranks of the job share, this rank, and how many there are."""
    if os.environ["WORLD_SIZE"] == "1" and "MASTER_PORT" not in os.environ:
        return torch.distributed.HashStore(), 0, 1
    return next(torch.distributed.rendezvous("env://", timeout=_TIMEOUT))


def shutdown() -> None:
    """Leave the job: the other ranks have finished too."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
