"""Record the date and the command that produced a result file."""

import datetime
import shlex
import sys
from collections.abc import Sequence


def origin(program: str, arguments: Sequence[str] | None = None) -> dict[str, str]:
    """Return date and command.

    The date is in UTC, to the second. The command is `python -m s2train.PROGRAM`.

    Args:
        arguments: of the program; by default this process's.
    """
    given = sys.argv[1:] if arguments is None else arguments
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", f"s2train.{program}", *given]),
    }
