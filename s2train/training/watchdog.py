"""Aborts a job if a rank makes no progress, and names it.

A collective call waits for all ranks. If one rank hangs, all others wait, and none of them knows for which rank. Here a
thread on every rank publishes its rank's position to the job's store. If a rank makes no progress for the time
allowed, all threads compare positions, and the first one decides what is reported. The rank at fault is, in this
order: one whose thread stopped publishing (dead or stopped), one that is behind the others, or one that waits for
something other than the ranks.
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

_TICKS_PER_TIMEOUT = 20
_LONGEST_TICK = 10.0  # seconds
_ANSWER_TICKS = 3  # a rank that publishes nothing for this many ticks is silent
_SHORTEST_ANSWER = 3.0  # seconds, or for this long: its thread may wait for a busy processor
# Keys of the store: how many ranks abort, what the first of them reports, and whether it is printed.
_ABORTING, _REPORT, _PRINTED = "watchdog/aborting", "watchdog/report", "watchdog/printed"
# Files in which a rank waits for other ranks, matched against the end of the innermost frame's path. NCCL's calls
# return immediately and the host waits where it reads a result: from the second row on.
WAITING_FILES = (
    "/distributed_c10d.py", "/param_and_grad_buffer.py", "/p2p_communication.py",
    "s2train/training/loop.py", "s2train/distributed/agreement.py", "s2train/training/optimizer.py",
    "s2train/training/peak_memory.py", "core/optimizer/clip_grads.py", "torch/cuda/__init__.py",
)  # fmt: skip


@dataclass(frozen=True)
class Position:
    """How far a rank has come and what it is doing.

    Attributes:
        ticks: how often its thread has published.
        beats: how often the rank has made progress.
        doing: its phase.
        frame: `file:line function` of the innermost Python frame.
        waits: whether that frame is in a collective call.
    """

    ticks: int
    beats: int
    doing: str
    frame: str
    waits: bool
    host: str


class Watchdog:
    """Watches this rank from a thread.

    Construct and start it on every rank once the process group exists.

    Args:
        minutes: abort when a rank makes no progress for this long.
    """

    def __init__(self, minutes: float) -> None:
        self._limit = minutes * 60
        self._tick = min(_LONGEST_TICK, self._limit / _TICKS_PER_TIMEOUT)
        self._answer = max(_ANSWER_TICKS * self._tick, _SHORTEST_ANSWER)
        self._store = _get_default_store().clone()  # type: ignore[attr-defined, unused-ignore]  # a separate connection: the main thread may block the other
        self._rank, self._world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._main = threading.main_thread().ident
        self._beats, self._doing, self._moved, self._ticks = 0, "starting", time.monotonic(), 0
        self._stopped = threading.Event()
        # The second thread covers a store that doesn't answer, which blocks the first.
        loops = (self._watch, self._watch_without_store)
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in loops]

    def beat(self, doing: str) -> None:
        """Record progress of this rank, which now enters the phase `doing`."""
        self._beats, self._doing, self._moved = self._beats + 1, doing, time.monotonic()

    @contextlib.contextmanager
    def watching(self) -> Iterator["Watchdog"]:
        """Watch inside this context."""
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stopped.set()

    def _watch_without_store(self) -> None:
        while not self._stopped.wait(self._tick):
            if time.monotonic() - self._moved > self._limit + 5 * self._answer:
                where = f"rank {self._rank} is in {self._doing}, on {socket.gethostname()}"
                limit = f"train.timeout_minutes={self._limit / 60:g}"
                problem = "the job made no progress in this time, and its store, on rank 0 or its torchrun,"
                print(f"error: {limit}: {problem} doesn't answer; {where}", file=sys.stderr, flush=True)
                os._exit(1)

    def _watch(self) -> None:
        # Without the store no rank can be named, but the timeout still applies.
        # It publishes at once: a rank that freezes within the first tick has a last position.
        while True:
            is_aborting = False
            with contextlib.suppress(Exception):
                self._publish()
                is_aborting = self._store.check([_ABORTING])
            if is_aborting or time.monotonic() - self._moved > self._limit:
                self._abort()
            if self._stopped.wait(self._tick):
                return

    def _publish(self) -> None:
        self._ticks += 1
        frame = sys._current_frames().get(self._main or 0)
        position = Position(self._ticks, self._beats, self._doing, *_describe(frame), socket.gethostname())
        self._store.set(f"watchdog/{self._rank}", json.dumps(asdict(position)))

    def _abort(self) -> None:
        is_culprit = True
        try:
            # Ranks' times run out seconds apart. The first decides for all: it could be gone when others' have.
            is_first = self._store.add(_ABORTING, 1) == 1
            before = self._positions()
            until = time.monotonic() + self._answer
            while time.monotonic() < until:
                time.sleep(self._tick)
                self._publish()
            after = self._positions()
            silent = [rank for rank in after if before.get(rank) == after[rank] and rank != self._rank]
            silent += [rank for rank in range(self._world) if rank not in after]
            culprits = silent or find_culprits(after)
            is_culprit = self._rank in culprits
            reporter = min(rank for rank in after if rank not in silent)
            self._report(is_first, reporter, f"error: {describe_hang(after, culprits, silent, self._limit / 60)}")
        except Exception:
            print(f"error: {self._doing} does not end", file=sys.stderr, flush=True)
        if is_culprit:
            faulthandler.dump_traceback(sys.stderr)
        # Other ranks may still read positions, and a rank that ends before them makes their collective calls fail.
        time.sleep(self._answer)
        os._exit(1)  # the main thread can't be interrupted

    def _report(self, is_first: bool, reporter: int, line: str) -> None:
        """Print the first rank's line on the rank that it chose.

        A job's console shows that one's output. The first rank prints the line if that one doesn't.
        """
        if is_first:
            self._store.set(_REPORT, json.dumps([reporter, line]))
        elif self._appears(_REPORT):
            reporter, line = json.loads(self._store.get(_REPORT))
        if self._rank == reporter:
            print(line, file=sys.stderr, flush=True)
            self._store.set(_PRINTED, "")
        elif is_first and not self._appears(_PRINTED):
            print(line, file=sys.stderr, flush=True)

    def _appears(self, key: str) -> bool:
        """Wait for a key of the store."""
        until = time.monotonic() + self._answer
        while not self._store.check([key]):
            if time.monotonic() > until:
                return False
            time.sleep(self._tick / 4)
        return True

    def _positions(self) -> dict[int, Position]:
        keys = {rank: f"watchdog/{rank}" for rank in range(self._world)}
        return {
            rank: Position(**json.loads(self._store.get(key))) for rank, key in keys.items() if self._store.check([key])
        }


def find_culprits(positions: dict[int, Position]) -> list[int]:
    """Find the ranks that hold up the job, if all ranks publish.

    Culprits are the ranks that are behind; if none is, the ranks that don't wait for others.
    """
    least = min(position.beats for position in positions.values())
    behind = [rank for rank, position in positions.items() if position.beats == least]
    if len(behind) == len(positions):
        behind = [rank for rank, position in positions.items() if not position.waits]
    return behind if len(behind) < len(positions) else []


def describe_hang(positions: dict[int, Position], culprits: list[int], silent: list[int], minutes: float) -> str:
    """Describe in one line which ranks hold up the job."""
    ranks = []
    for rank in sorted(culprits)[:8]:
        position = positions.get(rank)
        where = f"{position.doing}, in {position.frame}, on {position.host}" if position else "never responded"
        ranks.append(f"rank {rank} ({'not responding; last seen: ' if rank in silent and position else ''}{where})")
    if ranks:
        cause = f"held up by {'; '.join(ranks)}"
    else:
        rank, position = next(iter(sorted(positions.items())))
        cause = f"all ranks are at the same point as rank {rank} ({position.doing}, in {position.frame})"
    return (
        f"train.timeout_minutes={minutes:g}: the job made no progress in this time; {cause}."
        " Start the same command again to resume from the last checkpoint; set train.timeout_minutes higher if a step"
        " or a save takes that long"
    )


def _describe(frame: FrameType | None) -> tuple[str, bool]:
    """Describe a frame, and whether it waits for other ranks.

    The description is `file:line function`.
    """
    if frame is None:
        return "no frame", False
    path = frame.f_code.co_filename
    return f"{os.path.basename(path)}:{frame.f_lineno} {frame.f_code.co_name}", path.endswith(WAITING_FILES)
