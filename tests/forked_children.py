"""Forks the Python programs that a process starts, instead of starting interpreters that import everything again.

A child has the process id, parent, session, signals, exit status, environment and files that a separate program would
have. Only what its parent has imported is there already.
"""

import atexit
import contextlib
import gc
import inspect
import io
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.global_hydra import GlobalHydra

# Triton's functions are made for its interpreter, or not, as they are imported.
_INTERPRET = os.environ.get("TRITON_INTERPRET")
_kept: list[Any] = []  # the parent's streams, which would flush its text if they were freed


def fork_python_programs() -> None:
    """Have `subprocess` fork this process where it would start `python PROGRAM …` or `python -m MODULE …`."""
    inspect.stack = _stack
    fork_exec = subprocess._fork_exec  # type: ignore[attr-defined]

    def fork_or_exec(arguments: Sequence[str | bytes], *others: Any) -> int:
        command = [os.fsdecode(argument) for argument in arguments]
        environment = dict(os.fsdecode(pair).split("=", 1) for pair in others[4]) if others[4] else dict(os.environ)
        program = [word for word in command[1:] if word != "-u"]
        if program[:1] == ["-m"]:
            del program[0]
        is_program = bool(program) and not program[0].startswith("-")
        if command[0] != sys.executable or not is_program or environment.get("TRITON_INTERPRET") != _INTERPRET:
            return int(fork_exec(arguments, *others))
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if child := os.fork():
            return child
        try:
            _become_child(environment, *others[3:])
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        run_program(program[0], program[1:], is_unbuffered="-u" in command)

    subprocess._fork_exec = fork_or_exec  # type: ignore[attr-defined]


def _stack(context: int = 1) -> list[inspect.FrameInfo]:
    """The stack without lines of source: looking for them in thousands of modules takes torchrun seconds."""
    frames = (frame for frame, _ in traceback.walk_stack(sys._getframe(1)))
    return [
        inspect.FrameInfo(frame, frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, None, None)
        for frame in frames
    ]


def _become_child(
    environment: dict[str, str], cwd: str | None, _env: object, stdin: int, _1: int, _2: int, stdout: int, _3: int,
    stderr: int, _4: int, _5: int, _restore: bool, start_new_session: bool, process_group: int, *_others: object,
) -> None:  # fmt: skip
    gc.freeze()  # nothing of the parent is freed here: its threads are gone, which destructors would wait for
    atexit._clear()
    for number in signal.valid_signals():
        with contextlib.suppress(OSError, ValueError):
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if start_new_session:
        os.setsid()
    if process_group >= 0:
        os.setpgid(0, process_group)
    given = [(number, os.dup(fd)) for number, fd in enumerate((stdin, stdout, stderr)) if fd >= 0]
    for number, fd in given:
        os.dup2(fd, number)
    # Not closed: a file object of the parent may close its number once more, which would be another file's by then.
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):
                os.dup2(nothing, int(name), inheritable=False)
    os.environ.clear()
    os.environ |= environment
    if cwd is not None:
        os.chdir(cwd)
    GlobalHydra.instance().clear()


def run_program(program: str, arguments: Sequence[str], is_unbuffered: bool = False) -> NoReturn:
    """Run a script, or a module by its name, in this process, and exit with its status."""
    _kept.extend((sys.stdin, sys.stdout, sys.stderr))
    is_unbuffered |= bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    out = io.BufferedWriter(io.FileIO(1, "w", closefd=False))
    sys.stdout = io.TextIOWrapper(out, write_through=is_unbuffered, line_buffering=is_unbuffered)
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(2, "w", closefd=False)), line_buffering=True, errors="backslashreplace"
    )
    sys.argv = [program, *arguments]
    sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    status = 0
    try:
        if program.endswith(".py"):
            sys.path[0] = str(Path(program).parent.absolute())
            runpy.run_path(program, run_name="__main__")
        else:
            sys.path[0] = os.getcwd()
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)  # taking the interpreter apart takes a second
