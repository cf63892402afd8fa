"""What the programs in launch/ share: a composed config in, one clear error out."""

import os
import sys
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, MissingMandatoryValue

from s2train.config import to_object
from s2train.errors import ConfigError

USAGE_STATUS = 2


def run_command(cfg: DictConfig, command: Callable[[Any], None]) -> None:
    """Run a command on its config dataclass; bad input ends the process with one line on rank 0's stderr."""
    try:
        command(to_object(cfg))
    except (ConfigError, MissingMandatoryValue) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}".splitlines()[0], file=sys.stderr, flush=True)
        sys.exit(USAGE_STATUS)
