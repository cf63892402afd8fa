"""Connects the ranks of a job before there is a process group.

If one rank rejects its configuration, all ranks exit at once. A rank that exited alone would leave the others waiting,
and torchrun would restart all of them.
"""

import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
from torch.distributed import DistError, DistStoreError, PrefixStore, Store

from s2train.errors import ConfigError, MissingRankError, StartUpError

START_TIMEOUT = timedelta(minutes=10)  # for the slowest rank to import from a shared disk
# Rank 0 may host the store: it waits this long for the others to read the errors.
_ACKNOWLEDGE_TIMEOUT = timedelta(seconds=30)
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets them for each rank


def is_single_process() -> bool:
    """Whether the job has only this process."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or any(name not in os.environ for name in _RANK_VARIABLES)


def check_ranks() -> None:
    """Check the environment variables by which several ranks find each other.

    Raises:
        ConfigError: a variable is missing, not a number, or out of range.
    """
    remedy = "Start several processes by launch/job.py or torchrun --nproc-per-node N, or unset it to start one"
    numbers = {name: os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")}
    numbers |= {name: os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK")}
    for name, value in numbers.items():
        if not value.isdecimal():
            raise ConfigError(name, value, "not a whole number", remedy)
    ranks = int(numbers["WORLD_SIZE"])
    if ranks < 1:
        raise ConfigError("WORLD_SIZE", ranks, "not a number of processes", remedy)
    if int(numbers["RANK"]) >= ranks:
        raise ConfigError("RANK", numbers["RANK"], f"ranks are 0 to WORLD_SIZE - 1 = {ranks - 1}", remedy)
    if missing := [name for name in _RANK_VARIABLES if ranks > 1 and name not in os.environ]:
        raise ConfigError(
            "WORLD_SIZE", ranks, f"{', '.join(missing)} not set, so this process can't find the others", remedy
        )


def check_single_process() -> None:
    """Check that the job has only this process.

    Raises:
        ConfigError: the environment defines several ranks.
    """
    if (ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
        remedy = "Start it by python, without launch/job.py or torchrun, and unset WORLD_SIZE"
        raise ConfigError("WORLD_SIZE", ranks, "this program runs in one process", remedy)


def open_job_store(timeout: timedelta) -> tuple[Store, int, int]:
    """Open the job's store; returns it, this rank and the world size.

    torchrun's store outlives ranks that it restarts, and torch 2.13 would find the addresses of the dead ones there.
    Under one torchrun its restart count separates attempts. Several torchruns may count differently; they need
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which creates a store for each attempt (`launch/job.py` sets it for several
    nodes).
    """
    if os.environ["WORLD_SIZE"] == "1" and "MASTER_PORT" not in os.environ:
        return torch.distributed.HashStore(), 0, 1
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    keeps_it = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # Not torch.distributed.rendezvous: rank 0 would wait there for missing ranks without naming them.
    store = torch.distributed.TCPStore(
        *address,
        world_size,
        keeps_it,
        timeout,
        wait_for_workers=False,
        multi_tenant=True,  # for a process that opens it twice
    )
    is_one = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if is_one else "0"
    return PrefixStore(f"attempt {attempt}", store), rank, world_size


def start_store(store: Store) -> Store:
    """Return the part of the job's store that `wait_for_all_ranks` uses."""
    return PrefixStore("start", store)


def wait_for_all_ranks(store: Store, rank: int, world_size: int, problem: str = "") -> None:
    """Wait until every rank of the job has called this.

    Args:
        store: from `start_store`.
        problem: why this rank can't start; empty: it can.
    Raises:
        StartUpError: on every rank, if any rank has a problem.
        MissingRankError: on rank 0, if a rank is missing after `START_TIMEOUT`.
    """
    store.set(f"here/{rank}", json.dumps([socket.gethostname(), problem]))
    problems: list[str] = []
    if rank == 0:
        _wait_for_all(store, world_size)
        came = [json.loads(text) for text in store.multi_get([f"here/{other}" for other in range(world_size)])]
        problems = _merge_problems(came)
    raise_on_all_ranks(store, rank, world_size, "start", problems)


def raise_on_all_ranks(store: Store, rank: int, world_size: int, name: str, problems: Sequence[str]) -> None:
    """Raise StartUpError on every rank if rank 0 passes problems.

    Problems of other ranks are ignored.
    """
    if rank == 0:
        store.set(name, json.dumps(list(problems)))
    if found := json.loads(store.get(name)):
        store.set(f"{name}/{rank}", "received")
        if rank == 0:
            with suppress(DistStoreError):
                store.wait([f"{name}/{other}" for other in range(world_size)], _ACKNOWLEDGE_TIMEOUT)
        raise StartUpError(found)


@contextmanager
def fail_together() -> Iterator[None]:
    """If one rank raises ConfigError within, all ranks exit.

    For use before `wait_for_all_ranks`.

    Raises:
        StartUpError: on every rank, for a ConfigError on any.
        ConfigError: if the job has one process; or on this rank only, if the others are missing, or if another job
            holds the run folder (which may be this job's previous attempt, about to exit).
    """
    try:
        yield
    except ConfigError as error:
        if is_single_process() or isinstance(error.__cause__, BlockingIOError):
            raise
        reject_on_all_ranks(str(error).splitlines()[0])
        raise


def reject_on_all_ranks(line: str) -> None:
    """Raise on all ranks the reason why this rank can't start.

    Returns only if they can't be reached: rank 0 or the network is lost, which other ranks report.

    Raises:
        StartUpError: on every rank.
    """
    with suppress(MissingRankError, DistError):
        store, rank, world_size = open_job_store(START_TIMEOUT)
        wait_for_all_ranks(start_store(store), rank, world_size, line)


def _wait_for_all(store: Store, world_size: int) -> None:
    keys = [f"here/{rank}" for rank in range(world_size)]
    try:
        store.wait(keys, START_TIMEOUT)
    except DistStoreError:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        hosts = sorted({json.loads(store.get(key))[0] for rank, key in enumerate(keys) if rank not in missing})
        some = ", ".join(map(str, missing[:16])) + (", …" if len(missing) > 16 else "")
        raise MissingRankError(
            [
                f"rank {some} of {world_size} did not start within {START_TIMEOUT}, while those on"
                f" {', '.join(hosts)} did. See the other machines' logs"
            ]
        ) from None


def _merge_problems(came: Sequence[tuple[str, str]]) -> list[str]:
    """Merge (host, problem) of all ranks, equal problems once per machine.

    Problems that differ from rank 0's get their rank and host.
    """
    first = came[0][1]
    lines, listed = [first] if first else [], set()
    for rank, (host, problem) in enumerate(came):
        if problem and problem != first and (host, problem) not in listed:
            listed.add((host, problem))
            lines.append(f"rank {rank} on {host}: {problem}")
    return lines
