"""Set up a run's process groups, device and seeds."""

import math
import os
import random
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import PrefixStore, Store

from s2train.config import ParallelConfig
from s2train.distributed.rendezvous import open_job_store, start_store
from s2train.megatron import cpu

# Checks, on every rank, whether the ranks of a job fit together: (shared store, rank, number of ranks).
StartCheck = Callable[[Store, int, int], None]


def initialize(
    parallel: ParallelConfig,
    seed: int,
    check: StartCheck | None = None,
    *,
    deterministic: bool = False,
    timeout_minutes: float = 30,
) -> torch.device:
    """Join the job and make Megatron's process groups; return this rank's device.

    torchrun starts the job; a plain `python` is a job of one rank. The backend is NCCL with CUDA, else gloo. Call
    `shutdown` at the end.

    Args:
        check: called before a process group exists, because NCCL would hang on the problems that it finds.
        deterministic: compute the same bits in every run, with only deterministic kernels and sums in a fixed order.
        timeout_minutes: a collective call that takes longer fails.
    """
    if deterministic:
        make_deterministic()
    on_cpu = cpu.install()
    for name, default in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, default)
    if on_cpu:
        device = torch.device("cpu")
        # Ranks of one machine share its cores; torchrun's own default is one thread each.
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1").partition(",")[0]))  # it may be a list
    else:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        store, rank, world_size = open_job_store(timeout)
        if check is not None:
            check(start_store(store), rank, world_size)
        # No device_id: with it each of Megatron's groups gets a communicator, used or not: 8 GiB of an H100.
        torch.distributed.init_process_group(
            backend="gloo" if on_cpu else "nccl",
            store=PrefixStore("job", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
        _sum(device, torch.distributed.group.WORLD)  # gives NCCL the device; a barrier would guess it from the rank
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp,
        context_parallel_size=parallel.cp,
        distributed_timeout_minutes=math.ceil(timeout_minutes),
    )
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()  # as Megatron's own programs do
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (Megatron's datasets and others draw from it)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return device


def connect(parallel: ParallelConfig, device: torch.device) -> None:
    """Make the communicators that training uses now.

    Otherwise step 1 would make them at its memory peak. Call it after `initialize`, on all ranks together.
    """
    groups = [
        # for the gradient norm
        parallel_state.get_intra_distributed_optimizer_instance_group()
        if parallel.distributed_optimizer
        else parallel_state.get_model_parallel_group(),
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    ]
    if parallel.cp > 1:
        groups.append(parallel_state.get_context_parallel_group())
    if parallel.pp > 1:
        groups.append(parallel_state.get_pipeline_model_parallel_group())
        if parallel_state.is_rank_in_embedding_group(ignore_virtual=True):
            groups.append(parallel_state.get_embedding_group())
    for group in groups:
        _sum(device, group)


def _sum(device: torch.device, group: torch.distributed.ProcessGroup | None) -> None:
    torch.distributed.all_reduce(torch.zeros(1, device=device), group=group)


def make_deterministic() -> None:
    """Make torch, cuBLAS, NCCL and transformer-engine deterministic in this process.

    Call it before the first CUDA call, since the libraries read their environment variables at initialisation. An
    operation without a deterministic kernel raises RuntimeError when it runs.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")  # trees and switches may sum in a varying order
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # would hide a bug, and costs time


def shutdown() -> None:
    """Leave the job, when all ranks have finished."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
