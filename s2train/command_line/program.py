"""Runs the programs of launch/ and reports their errors in one line."""

import errno
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from hydra.errors import HydraException

from s2train.command_line.composition import (
    CONF,
    config_groups,
    explain,
    hydra_arguments,
    options_first,
    overrides_of,
    own_folders,
)
from s2train.command_line.messages import prints_messages
from s2train.command_line.old_names import with_current_names
from s2train.command_line.sweep_values import check_no_sweep
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
from s2train.files import replacing

_RANK_0_SECONDS = 10.0
_SETTING = re.compile(r"(\+{0,2}[A-Za-z_][\w./@]*=|~)")  # Hydra's syntax; options never match


def run_hydra(
    main: Callable[[], None], schema: type, doc: str | None, others: Mapping[type, str] = MappingProxyType({})
) -> None:
    """Run a program's `hydra.main`, and report composition errors in one line.

    Hydra would print several lines on every rank; HYDRA_FULL_ERROR=1 shows them, with the stack. Without arguments the
    program prints its required settings, with --help all settings. Composition errors exit like other bad input in
    `run_command`.

    Args:
        schema: the dataclass of its settings.
        doc: docstring of its module.
        others: dataclasses of settings of Hydra's plugins, each with its prefix; a program without them runs no sweeps.
    """
    arguments, groups = sys.argv[1:], config_groups(CONF)
    if not arguments:
        _exit_without_restart(brief_usage(doc or "", schema, groups), USAGE_STATUS)
    if {"--help", "-h"} & set(arguments):
        if prints_messages():
            print(usage(doc or "", schema, groups, others))
        return
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        sys.argv[1:] = _checked(arguments, schema, runs_sweeps=bool(others))
        main()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises errors instead of printing them
    try:
        sys.argv[1:] = _checked(arguments, schema, runs_sweeps=bool(others))
        main()
    except ConfigError as error:  # two names of one setting
        run_command(partial(_reject_composition, str(error)))
    except HydraException as error:
        known = config_groups(CONF, *own_folders(arguments))
        line = explain(error, overrides_of(sys.argv[1:]), known, schema, runs_sweeps=bool(others))
        run_command(partial(_reject_composition, line))
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)


def _checked(arguments: Sequence[str], schema: type, runs_sweeps: bool) -> list[str]:
    """Convert a command line to Hydra's, and check it.

    Raises:
        ConfigError: as `hydra_arguments`, or it asks for a sweep that the program doesn't run.
    """
    if not runs_sweeps:
        check_no_sweep(arguments)
    return options_first(hydra_arguments(arguments, schema))


def run_command(command: Callable[[], None], schema: type | None = None) -> None:
    """Run a program; report errors in one line and an exit status.

    Bad input exits with status 2 and one line on rank 0's stderr, a failed run with 1. A run stopped by a signal exits
    with EXIT_REQUEUE, or with 128 + the signal's number if it saved nothing. Ctrl-C exits with INTERRUPTED_STATUS.

    Args:
        schema: the dataclass of settings that the program composes; None: a training run's.
    """
    try:
        command()
        if STATUS_FILE in os.environ:  # an earlier attempt may have written its status there
            Path(os.environ[STATUS_FILE]).write_text("0")
    except StoppedBySignal as stop:
        _exit_without_restart(str(stop), stop.status, seconds=1.0)  # all ranks stop at the same step
    except KeyboardInterrupt:
        if prints_messages():
            print("interrupted; saved files are kept", file=sys.stderr, flush=True)
        if STATUS_FILE in os.environ:
            Path(os.environ[STATUS_FILE]).write_text(str(INTERRUPTED_STATUS))
        # Not 0: ranks that were not interrupted would wait for this one.
        sys.exit(INTERRUPTED_STATUS)
    except DivergedError as error:
        _exit_without_restart(f"error: {error}", 1)
    except TrainingError as error:
        _exit(f"error: {error}", 1)
    except HydraException as error:  # of a run that the program composes; may be an OSError
        from s2train.config import PretrainConfig

        settings = [word for word in sys.argv[1:] if _SETTING.match(word)]
        _reject(explain(error, settings, config_groups(CONF), schema or PretrainConfig, runs_sweeps=False))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _exit(f"error: {error}. Make room; the same command resumes from the last checkpoint", 1)
    except MissingRankError as error:
        _exit(_lines(error), USAGE_STATUS)
    except StartUpError as error:
        _exit_without_restart(_lines(error), USAGE_STATUS)
    except ConfigError as error:
        _reject(str(error).splitlines()[0])
    except Exception as error:  # Python prints its stack
        _write_torchelastic_error(f"{type(error).__name__}: {error}".splitlines()[0])
        raise


def settings_before_options(arguments: Sequence[str]) -> list[str]:
    """Move settings (`name=value`) before the first option, under their current names.

    argparse would read a setting after an option of several values as one more value.
    """
    settings = [word for word in arguments if _SETTING.match(word)]
    with suppress(ConfigError):  # of two names of one setting; raised again when the settings are composed
        settings = with_current_names(settings)
    others = [word for word in arguments if not _SETTING.match(word)]
    first = next((number for number, word in enumerate(others) if word.startswith("-")), len(others))
    return [*others[:first], *settings, *others[first:]]


def option_name(name: str) -> str:
    """Return the option of a name in argparse's namespace."""
    return f"--{name.replace('_', '-')}"


def tokens(text: str) -> int:
    """Parse an option's number of tokens, such as 8192, 8k or 1m.

    argparse puts the function's name into its error: invalid tokens value.
    """
    factor = {"k": 1024, "m": 1024**2}.get(text[-1:].lower(), 1)
    return int(text if factor == 1 else text[:-1]) * factor


def _reject_composition(line: str) -> NoReturn:
    from s2train.distributed.rendezvous import is_single_process, reject_on_all_ranks  # imports torch: slow

    if not is_single_process():
        reject_on_all_ranks(line)
    _reject(line)


def _reject(line: str) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    if os.environ.get("WORLD_SIZE", "1") == "1":
        _exit_without_restart(f"error: {line}", USAGE_STATUS)
    if rank != "0" and os.environ.get("LOCAL_RANK") == "0":  # the cause may be specific to this machine
        print(f"rank {rank} on {socket.gethostname()}: error: {line}", file=sys.stderr, flush=True)
    _exit(f"error: {line}", USAGE_STATUS)


def _lines(error: StartUpError) -> str:
    return "\n".join(f"error: {problem}" for problem in error.problems)


def _exit(line: str, status: int, seconds: float = _RANK_0_SECONDS) -> NoReturn:
    """Print the line on rank 0, and exit.

    torchrun kills the other ranks, and may restart all.

    Args:
        seconds: how long other ranks wait for rank 0 to print.
    """
    if prints_messages():
        print(line, file=sys.stderr, flush=True)
        _write_torchelastic_error(line)
    else:  # if another rank exited first, torchrun would kill rank 0 before it prints
        time.sleep(seconds)
    sys.exit(status)


def _write_torchelastic_error(line: str) -> None:
    """Write the line to torchrun's error file, which its report ends with.

    At once, since torchrun reads it as soon as any rank has died, and fails instead of restarting if it is incomplete.
    """
    if (path := os.environ.get("TORCHELASTIC_ERROR_FILE")) is None:
        return
    extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
    with suppress(OSError), replacing(Path(path)) as new:
        new.write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}))


def _exit_without_restart(line: str, status: int, seconds: float = _RANK_0_SECONDS) -> NoReturn:
    """Exit like `_exit` on all ranks, without a restart by torchrun."""
    if STATUS_FILE not in os.environ:
        _exit(line, status, seconds)
    if prints_messages():
        print(line, file=sys.stderr, flush=True)
    Path(os.environ[STATUS_FILE]).write_text(str(status))
    sys.exit(0)
