"""Where the ranks of a job meet before there is a process group, so that what one of them refuses ends all, at once.

A rank that ended alone would leave the others waiting for it, and torchrun would start all of them again.
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

ARRIVAL = timedelta(minutes=10)  # for the slowest rank's imports from a shared disk
_HEARD = timedelta(seconds=30)  # that rank 0, which may keep the store, waits for the others to read why they end


_PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets them for each rank


def is_alone() -> bool:
    """Whether this process is a job of one."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or any(name not in os.environ for name in _PLACE)


def check_ranks() -> None:
    """Whether the environment says where to meet, if it says that there are several ranks.

    Raises:
        ConfigError: a variable is missing, no number, or out of range.
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
    if missing := [name for name in _PLACE if ranks > 1 and name not in os.environ]:
        raise ConfigError(
            "WORLD_SIZE", ranks, f"{', '.join(missing)} not set, so that this process finds no other", remedy
        )


def check_alone() -> None:
    """Whether this process is a job of one, as of a program that writes one folder.

    Raises:
        ConfigError: the environment says that there are several ranks.
    """
    if (ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
        remedy = "Start it by python, without launch/job.py or torchrun, and unset WORLD_SIZE"
        raise ConfigError("WORLD_SIZE", ranks, "this program runs in one process", remedy)


def meet(timeout: timedelta) -> tuple[Store, int, int]:
    """A store that the ranks of the job share, this rank, and how many there are.

    torchrun's store outlives ranks that it starts again, and torch 2.13 would find the addresses of the dead ones
    there. Under one torchrun its count of restarts tells attempts apart; several may count differently, and want
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which makes a store for each attempt (`launch/job.py` sets it).
    """
    if os.environ["WORLD_SIZE"] == "1" and "MASTER_PORT" not in os.environ:
        return torch.distributed.HashStore(), 0, 1
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    keeps_it = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # Not by torch.distributed.rendezvous: rank 0 would wait there for ranks that never come, and name none.
    store = torch.distributed.TCPStore(
        *address,
        world_size,
        keeps_it,
        timeout,
        wait_for_workers=False,
        multi_tenant=True,  # for a process that comes here twice
    )
    is_one = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if is_one else "0"
    return PrefixStore(f"attempt {attempt}", store), rank, world_size


def start_store(store: Store) -> Store:
    """The part of the job's store that `arrive` uses."""
    return PrefixStore("start", store)


def arrive(store: Store, rank: int, world_size: int, refusal: str = "") -> None:
    """Wait until every rank of the job has come here.

    Args:
        store: of `start_store`.
        refusal: why this rank can't start; empty: it can.
    Raises:
        StartUpError: on every rank, if any refuses.
        MissingRankError: on rank 0, if not all came within `ARRIVAL`.
    """
    store.set(f"here/{rank}", json.dumps([socket.gethostname(), refusal]))
    refusals: list[str] = []
    if rank == 0:
        _await_all(store, world_size)
        came = [json.loads(text) for text in store.multi_get([f"here/{other}" for other in range(world_size)])]
        refusals = _merged(came)
    exit_on_any_problem(store, rank, world_size, "refusals", refusals)


def exit_on_any_problem(store: Store, rank: int, world_size: int, name: str, problems: Sequence[str]) -> None:
    """Raise StartUpError on every rank if rank 0 tells of problems; those of other ranks don't count."""
    if rank == 0:
        store.set(name, json.dumps(list(problems)))
    if told := json.loads(store.get(name)):
        store.set(f"{name}/{rank}", "heard")
        if rank == 0:
            with suppress(DistStoreError):
                store.wait([f"{name}/{other}" for other in range(world_size)], _HEARD)
        raise StartUpError(told)


@contextmanager
def fail_together() -> Iterator[None]:
    """What one rank refuses within, before it has met the others, is refused by all of them.

    Raises:
        StartUpError: on every rank, for a ConfigError on any.
        ConfigError: of a job of one; or of this rank alone: the others don't come, or another job holds the run
            folder, which may be this one's earlier attempt at its end.
    """
    try:
        yield
    except ConfigError as error:
        if is_alone() or isinstance(error.__cause__, BlockingIOError):
            raise
        refuse(str(error).splitlines()[0])
        raise


def refuse(line: str) -> None:
    """Tell all ranks of the job why this one can't start. Returns only if they can't be met: rank 0 or the network is
    lost, and others tell of that.

    Raises:
        StartUpError: on every rank.
    """
    with suppress(MissingRankError, DistError):
        store, rank, world_size = meet(ARRIVAL)
        arrive(start_store(store), rank, world_size, line)


def _await_all(store: Store, world_size: int) -> None:
    keys = [f"here/{rank}" for rank in range(world_size)]
    try:
        store.wait(keys, ARRIVAL)
    except DistStoreError:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        hosts = sorted({json.loads(store.get(key))[0] for rank, key in enumerate(keys) if rank not in missing})
        some = ", ".join(map(str, missing[:16])) + (", …" if len(missing) > 16 else "")
        raise MissingRankError(
            [
                f"rank {some} of {world_size} did not start within {ARRIVAL}, while those on {', '.join(hosts)} did."
                " See the other machines' logs"
            ]
        ) from None


def _merged(came: Sequence[tuple[str, str]]) -> list[str]:
    """Refusals by rank, of (host, refusal): rank 0's own plainly, others that differ from it once for each machine."""
    first = came[0][1]
    lines, told = [first] if first else [], set()
    for rank, (host, refusal) in enumerate(came):
        if refusal and refusal != first and (host, refusal) not in told:
            told.add((host, refusal))
            lines.append(f"rank {rank} on {host}: {refusal}")
    return lines
