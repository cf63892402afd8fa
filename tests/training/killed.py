"""Runs launch/pretrain.py repeatedly: `killed.py SEED KILLS [setting=value …]`.

Kills it at random moments KILLS times, then lets it finish. Forks two ranks from a process that has imported
everything, so that an attempt takes seconds. Exits with the last attempt's status.
"""

import importlib
import os
import random
import runpy
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from s2train.distributed.ports import hold_port, port_of

PROGRAM = str(Path(__file__).parents[2] / "launch" / "pretrain.py")
RANKS = 2


def plant(draw: random.Random) -> None:
    """Kill this process at a random moment of one of the first steps or the save after it: of the fifth at the latest.

    The delay is a guess by the step before, which a busy machine may have delayed.
    """
    from s2train.training import loop

    run_step, armed, calls = loop.run_step, draw.randrange(2, 5), [time.monotonic()]

    def planted(*args: Any, **kwargs: Any) -> float:
        calls.append(time.monotonic())
        if len(calls) - 1 == armed:
            delay = draw.uniform(0, 1.5) * (calls[-1] - calls[-2])
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif len(calls) - 1 == armed + 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return run_step(*args, **kwargs)

    loop.run_step = planted


def attempt(draw: random.Random, settings: list[str], *, is_killed: bool) -> int:
    """Run one job and return its status.

    If `is_killed`, one rank is killed, whose status counts. When a rank fails, the others are killed, as torchrun does.
    """
    victim, ranks = draw.randrange(RANKS), list[int]()
    with hold_port() as held:
        for rank in range(RANKS):
            if (child := os.fork()) == 0:
                os.setpgid(0, 0)
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port_of(held))}
                os.environ["LOCAL_WORLD_SIZE"] = str(RANKS)
                if is_killed and rank == victim:
                    plant(draw)
                sys.argv = [PROGRAM, *settings]
                runpy.run_path(PROGRAM, run_name="__main__")
                sys.stdout.flush()
                os._exit(0)
            ranks.append(child)
        status = 0
        while ranks:
            # not whichever has ended: a rank that misses the victim may be found first
            child, ended = os.waitpid(ranks[victim] if is_killed and len(ranks) == RANKS else -1, 0)
            ranks.remove(child)
            if ended and not status:
                status = ended
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
    return status


if __name__ == "__main__":
    seed, kills = int(sys.argv[1]), int(sys.argv[2])
    importlib.import_module("s2train.training.run")
    sys.path.insert(0, str(Path(PROGRAM).parent))
    generator = random.Random(seed)
    for _ in range(kills):
        if attempt(generator, sys.argv[3:], is_killed=True) != signal.SIGKILL:
            sys.exit("an attempt that should have been killed ended otherwise")
    sys.exit(int(attempt(generator, sys.argv[3:], is_killed=False) != 0))
