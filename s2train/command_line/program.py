"""What the programs in launch/ share: a composed config in, one clear error out."""

import errno
import json
import os
import re
import socket
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from hydra.errors import HydraException

from s2train.command_line.composition import CONF, config_groups, explain, hydra_arguments
from s2train.command_line.messages import prints_messages
from s2train.command_line.old_names import with_current_names
from s2train.command_line.usage import brief_usage, usage
from s2train.errors import (
    INTERRUPTED_STATUS,
    STATUS_FILE,
    USAGE_STATUS,
    ConfigError,
    DivergedError,
    MissingRankError,
    StartUpError,
    StoppedBySignal,
    TrainingError,
)

_SECONDS_TO_SPEAK = 10.0
_SETTING = re.compile(r"(\+{0,2}[A-Za-z_][\w./@]*=|~)")  # Hydra's, which options never look like


def run_hydra(
    main: Callable[[], None], schema: type, doc: str | None, others: Mapping[type, str] = MappingProxyType({})
) -> None:
    """Run a program's `hydra.main`; what doesn't compose ends it as `run_command` ends a program on bad input.

    Hydra would tell it on several lines, on every rank. HYDRA_FULL_ERROR=1 shows them, and the stack. Without
    arguments the program prints what it needs, with --help all settings.

    Args:
        schema: the dataclass of its settings.
        doc: of its module.
        others: dataclasses of settings of Hydra's parts, each with its prefix.
    """
    arguments, groups = sys.argv[1:], config_groups(CONF)
    if not arguments:
        _end_with_all(brief_usage(doc or "", schema, groups), USAGE_STATUS)
    if {"--help", "-h"} & set(arguments):
        if prints_messages():
            print(usage(doc or "", schema, groups, others))
        return
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        sys.argv[1:] = hydra_arguments(arguments, schema)
        main()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors get here
    try:
        sys.argv[1:] = hydra_arguments(arguments, schema)
        main()
    except ConfigError as error:  # of names
        run_command(partial(_refuse_composition, str(error)))
    except HydraException as error:
        overrides = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
        line = explain(error, overrides, groups, schema)
        run_command(partial(_refuse_composition, line))
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)


def run_command(command: Callable[[], None]) -> None:
    """Run a program. Bad input ends the process with status 2 and one line on rank 0's stderr, a failed run with 1.

    A run that stopped for a signal ends with EXIT_REQUEUE, or, if it saved nothing, with 128 + the signal's number; a
    program that Ctrl-C ended, with INTERRUPTED_STATUS.
    """
    # Megatron tells at length that apex and transformer-engine are absent, and torch that Megatron is behind its names.
    warnings.filterwarnings("ignore", module=r"(s2train\.)?megatron|torch\.distributed")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    try:
        command()
        if STATUS_FILE in os.environ:  # an earlier attempt may have left its own there
            Path(os.environ[STATUS_FILE]).write_text("0")
    except StoppedBySignal as stop:
        _end_with_all(str(stop), stop.status, seconds=1.0)  # the ranks have just left together
    except KeyboardInterrupt:
        if prints_messages():
            print("interrupted; what was saved is kept", file=sys.stderr, flush=True)
        if STATUS_FILE in os.environ:
            Path(os.environ[STATUS_FILE]).write_text(str(INTERRUPTED_STATUS))
        # Not with 0: where the other ranks were not interrupted, they would wait for this one.
        sys.exit(INTERRUPTED_STATUS)
    except DivergedError as error:
        _end_with_all(f"error: {error}", 1)
    except TrainingError as error:
        _end(f"error: {error}", 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _end(f"error: {error}. Make room; the same command resumes from the last checkpoint", 1)
    except MissingRankError as error:
        _end(_lines(error), USAGE_STATUS)
    except StartUpError as error:
        _end_with_all(_lines(error), USAGE_STATUS)
    except ConfigError as error:
        _refuse(str(error).splitlines()[0])
    except Exception as error:  # whose stack Python prints
        _record(f"{type(error).__name__}: {error}".splitlines()[0])
        raise


def settings_before_options(arguments: Sequence[str]) -> list[str]:
    """A command line with its settings (`name=value`) under current names and moved before the first option.

    For argparse, which takes every word after an option of several values for one more of them.
    """
    settings = [word for word in arguments if _SETTING.match(word)]
    with suppress(ConfigError):  # of two names of one setting; raised again when the settings are composed
        settings = with_current_names(settings)
    others = [word for word in arguments if not _SETTING.match(word)]
    first = next((number for number, word in enumerate(others) if word.startswith("-")), len(others))
    return [*others[:first], *settings, *others[first:]]


def _refuse_composition(line: str) -> NoReturn:
    from s2train.distributed.rendezvous import is_alone, refuse  # imports torch: slow

    if not is_alone():
        refuse(line)
    _refuse(line)


def _refuse(line: str) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    if os.environ.get("WORLD_SIZE", "1") == "1":
        _end_with_all(f"error: {line}", USAGE_STATUS)
    if rank != "0" and os.environ.get("LOCAL_RANK") == "0":  # what is wrong may be wrong on this machine alone
        print(f"rank {rank} on {socket.gethostname()}: error: {line}", file=sys.stderr, flush=True)
    _end(f"error: {line}", USAGE_STATUS)


def _lines(error: StartUpError) -> str:
    return "\n".join(f"error: {problem}" for problem in error.problems)


def _end(line: str, status: int, seconds: float = _SECONDS_TO_SPEAK) -> NoReturn:
    """The last words of this process, and its status; torchrun ends the other ranks, and may start all again.

    Args:
        seconds: that rank 0 has to speak.
    """
    if prints_messages():
        print(line, file=sys.stderr, flush=True)
        _record(line)
    else:  # where another rank ended first, torchrun would kill rank 0 before it spoke
        time.sleep(seconds)
    sys.exit(status)


def _record(line: str) -> None:
    """Let torchrun's own report of some 40 lines end with this one."""
    if (path := os.environ.get("TORCHELASTIC_ERROR_FILE")) is None:
        return
    extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
    with suppress(OSError):
        Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}))


def _end_with_all(line: str, status: int, seconds: float = _SECONDS_TO_SPEAK) -> NoReturn:
    """As `_end`, where every rank ends so: nothing is started again."""
    if STATUS_FILE not in os.environ:
        _end(line, status, seconds)
    if prints_messages():
        print(line, file=sys.stderr, flush=True)
    Path(os.environ[STATUS_FILE]).write_text(str(status))
    sys.exit(0)
