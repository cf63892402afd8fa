"""What the programs in launch/ share: a composed config in, one clear error out."""

import os
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from hydra.errors import HydraException
from omegaconf import MissingMandatoryValue

from s2train.composition import config_groups, explain
from s2train.errors import ConfigError, StartUpError, TrainingError

USAGE_STATUS = 2
_CONF = Path(__file__).parents[1] / "conf"


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
        _refuse(explain(error, overrides, config_groups(_CONF), schema))
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)


def run_command(command: Callable[[], None]) -> None:
    """Run a program; bad input ends the process with status 2 and one line on rank 0's stderr, a failed run with 1."""
    # Megatron tells at length that apex and transformer-engine are absent, and torch that Megatron is behind its names.
    warnings.filterwarnings("ignore", module=r"megatron|torch\.distributed")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    try:
        command()
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except StartUpError as error:
        if os.environ.get("RANK", "0") == "0":
            print(*(f"error: {problem}" for problem in error.problems), sep="\n", file=sys.stderr, flush=True)
        sys.exit(USAGE_STATUS)
    except (ConfigError, MissingMandatoryValue) as error:
        _refuse(str(error).splitlines()[0])


def _refuse(line: str) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"error: {line}", file=sys.stderr, flush=True)
    elif os.environ.get("LOCAL_RANK") == "0":  # what is wrong may be wrong on this machine alone
        print(f"rank {rank} on {socket.gethostname()}: error: {line}", file=sys.stderr, flush=True)
    sys.exit(USAGE_STATUS)
