"""What the programs in launch/ share: a composed config in, one clear error out."""

import os
import sys
import warnings
from collections.abc import Callable

from omegaconf import MissingMandatoryValue

from s2train.errors import ConfigError, TrainingError

USAGE_STATUS = 2


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
    except (ConfigError, MissingMandatoryValue) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        sys.exit(USAGE_STATUS)
