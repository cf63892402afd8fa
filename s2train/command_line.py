"""What the programs in launch/ share: a composed config in, one clear error out."""

import errno
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from hydra.errors import HydraException

from s2train.composition import CONF, config_groups, explain
from s2train.errors import EXIT_REQUEUE, ConfigError, StartUpError, StoppedBySignal, TrainingError

USAGE_STATUS = 2
# Names a file. If set, a rank that stops for a signal writes EXIT_REQUEUE there and ends with 0: torchrun takes
# any other status for a failure, which it would restart or report as its own 1. `launch/job.py` sets it.
STATUS_FILE = "S2TRAIN_STATUS_FILE"
_SECONDS_TO_SPEAK = 10.0


def run_hydra(main: Callable[[], None], schema: type) -> None:
    """Run a program's `hydra.main`; what doesn't compose ends it as `run_command` ends a program on bad input.

    Hydra would tell it on several lines, on every rank. HYDRA_FULL_ERROR=1 shows them, and the stack.
    """
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        main()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors get here
    try:
        main()
    except HydraException as error:
        overrides = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
        _refuse(explain(error, overrides, config_groups(CONF), schema))
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)


def run_command(command: Callable[[], None]) -> None:
    """Run a program. Bad input ends the process with status 2 and one line on rank 0's stderr, a failed run with 1.

    A run that stopped for a signal ends with EXIT_REQUEUE.
    """
    # Megatron tells at length that apex and transformer-engine are absent, and torch that Megatron is behind its names.
    warnings.filterwarnings("ignore", module=r"(s2train\.)?megatron|torch\.distributed")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    try:
        command()
        if STATUS_FILE in os.environ:  # an earlier attempt may have left its own there
            Path(os.environ[STATUS_FILE]).write_text("0")
    except StoppedBySignal as stop:
        if os.environ.get("RANK", "0") == "0":
            print(stop, file=sys.stderr, flush=True)
        if STATUS_FILE not in os.environ:
            sys.exit(EXIT_REQUEUE)
        Path(os.environ[STATUS_FILE]).write_text(str(EXIT_REQUEUE))
    except TrainingError as error:
        _tell(f"error: {error}")
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _tell(f"error: {error}. Make room; the same command goes on from the last checkpoint")
        sys.exit(1)
    except StartUpError as error:
        if os.environ.get("RANK", "0") == "0":
            print(*(f"error: {problem}" for problem in error.problems), sep="\n", file=sys.stderr, flush=True)
        sys.exit(USAGE_STATUS)
    except ConfigError as error:
        _refuse(str(error).splitlines()[0])


def _refuse(line: str) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    if rank != "0" and os.environ.get("LOCAL_RANK") == "0":  # what is wrong may be wrong on this machine alone
        print(f"rank {rank} on {socket.gethostname()}: error: {line}", file=sys.stderr, flush=True)
    _tell(f"error: {line}")
    sys.exit(USAGE_STATUS)


def _tell(line: str) -> None:
    """The last words of this process; where another rank ended first, torchrun would kill rank 0 before it spoke."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
    else:
        time.sleep(_SECONDS_TO_SPEAK)
