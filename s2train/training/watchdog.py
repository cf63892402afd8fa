"""Ends a job in which a rank comes no further, and names the rank.

A collective call waits for all ranks, so that one that hangs holds up every other, and each of them only knows that
it waits. Here a thread on every rank tells the job's store where its rank is. When a rank has not moved for the time
allowed, the threads compare: a rank whose thread is silent too is dead or stopped; else one that has come less far
than others; else one that waits for something other than the ranks.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import FrameType

import torch
from torch.distributed.distributed_c10d import _get_default_store

_LOOKS = 20  # in the time allowed
_LONGEST_TICK = 10.0  # seconds
_ANSWER_TICKS = 3  # that a silent rank has to speak up
# Where a rank waits for other ranks: ends of the innermost frame's file. NCCL's calls return at once, and the host
# waits where it reads a result: from the second row on.
_WAITING = (
    "/distributed_c10d.py", "/param_and_grad_buffer.py", "/p2p_communication.py",
    "s2train/training/loop.py", "s2train/distributed/agreement.py", "s2train/training/optimizer.py",
    "s2train/training/peak_memory.py", "core/optimizer/clip_grads.py", "torch/cuda/__init__.py",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a rank is.

    Attributes:
        ticks: how often its thread has looked.
        beats: how often the rank has moved.
        doing: its phase.
        frame: `file:line function` of the innermost Python frame.
        waits: whether that is a collective call.
    """

    ticks: int
    beats: int
    doing: str
    frame: str
    waits: bool
    host: str


class Watchdog:
    """Watches this rank from a thread; construct and start it on every rank once the process group is there.

    Args:
        minutes: how long a rank may stay where it is.
    """

    def __init__(self, minutes: float) -> None:
        self._limit = minutes * 60
        self._tick = min(_LONGEST_TICK, self._limit / _LOOKS)
        self._store = _get_default_store().clone()  # type: ignore[attr-defined, unused-ignore]  # a connection of its own: the rank may block the other
        self._rank, self._world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._main = threading.main_thread().ident
        self._beats, self._doing, self._moved, self._ticks = 0, "starting", time.monotonic(), 0
        self._over = threading.Event()
        # The second is for a store that doesn't answer, which keeps the first waiting.
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._watch, self._watch_alone)]

    def beat(self, doing: str) -> None:
        """This rank has moved, and does this now."""
        self._beats, self._doing, self._moved = self._beats + 1, doing, time.monotonic()

    @contextlib.contextmanager
    def watching(self) -> Iterator["Watchdog"]:
        """Watch within."""
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._over.set()

    def _watch_alone(self) -> None:
        while not self._over.wait(self._tick):
            if time.monotonic() - self._moved > self._limit + 5 * _ANSWER_TICKS * self._tick:
                where = f"rank {self._rank} is in {self._doing}, on {socket.gethostname()}"
                problem = "the job has come no further in this time, and its store, which rank 0 or its torchrun keeps"
                limit = f"train.timeout_minutes={self._limit / 60:g}"
                print(f"error: {limit}: {problem}, doesn't answer; {where}", file=sys.stderr, flush=True)
                os._exit(1)

    def _watch(self) -> None:
        # A store that can't be reached names nobody, but the time allowed still ends.
        while not self._over.wait(self._tick):
            with contextlib.suppress(Exception):
                self._publish()
            if time.monotonic() - self._moved > self._limit:
                self._end()

    def _publish(self) -> None:
        self._ticks += 1
        frame = sys._current_frames().get(self._main or 0)
        place = Place(self._ticks, self._beats, self._doing, *_where(frame), socket.gethostname())
        self._store.set(f"watchdog/{self._rank}", json.dumps(asdict(place)))

    def _end(self) -> None:
        line, is_teller, is_culprit = f"error: {self._doing} does not end", True, True
        with contextlib.suppress(Exception):
            before = self._places()
            for _ in range(_ANSWER_TICKS):
                time.sleep(self._tick)
                self._publish()
            after = self._places()
            silent = [rank for rank in after if before.get(rank) == after[rank] and rank != self._rank]
            silent += [rank for rank in range(self._world) if rank not in after]
            culprits = silent or culprits_among(after)
            is_teller = self._rank == min(rank for rank in after if rank not in silent)
            is_culprit = self._rank in culprits
            line = f"error: {verdict(after, culprits, silent, self._limit / 60)}"
        if is_teller:
            print(line, file=sys.stderr, flush=True)
        if is_culprit:
            faulthandler.dump_traceback(sys.stderr)
        time.sleep(_ANSWER_TICKS * self._tick)  # others may still be asking
        os._exit(1)  # the main thread can't be woken

    def _places(self) -> dict[int, Place]:
        keys = {rank: f"watchdog/{rank}" for rank in range(self._world)}
        return {
            rank: Place(**json.loads(self._store.get(key))) for rank, key in keys.items() if self._store.check([key])
        }


def culprits_among(places: dict[int, Place]) -> list[int]:
    """Of ranks that all speak: those that have come least far, or else those that don't wait for others."""
    least = min(place.beats for place in places.values())
    behind = [rank for rank, place in places.items() if place.beats == least]
    if len(behind) == len(places):
        behind = [rank for rank, place in places.items() if not place.waits]
    return behind if len(behind) < len(places) else []


def verdict(places: dict[int, Place], culprits: list[int], silent: list[int], minutes: float) -> str:
    """One line: which ranks hold up the job, and where they are."""
    told = []
    for rank in sorted(culprits)[:8]:
        place = places.get(rank)
        where = f"{place.doing}, in {place.frame}, on {place.host}" if place else "has never spoken"
        told.append(f"rank {rank} ({'silent; last seen: ' if rank in silent and place else ''}{where})")
    if not told:
        rank, place = next(iter(sorted(places.items())))
        told = [f"no rank stands out: all are where rank {rank} is ({place.doing}, in {place.frame})"]
    return (
        f"train.timeout_minutes={minutes:g}: the job has come no further in this time; held up by {'; '.join(told)}."
        " Start the same command again to go on from the last checkpoint; set train.timeout_minutes higher if a step"
        " or a save takes that long"
    )


def _where(frame: FrameType | None) -> tuple[str, bool]:
    if frame is None:
        return "no frame", False
    path = frame.f_code.co_filename
    return f"{os.path.basename(path)}:{frame.f_lineno} {frame.f_code.co_name}", path.endswith(_WAITING)
