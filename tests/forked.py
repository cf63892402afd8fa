"""Runs programs as forks of a process that has imported everything, since importing takes longer than most tests.

`python -m tests.forked serve SOCKET OWNER` is that process: a server that reads a job from each connection, runs it and
answers with its status. All workers of pytest-xdist share it; it ends when the process OWNER has ended.
tests/fork_client.py is a program that the server forks for shell scripts.
`python -m tests.forked PROGRAM …` imports everything and is then that program itself, for tests that signal it.

The Python programs that a job starts, such as torchrun's ranks, are forks too (tests/forked_children.py).
"""

import contextlib
import functools
import gc
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NoReturn

import psutil
from filelock import FileLock

from s2train.distributed.ports import hold_port, port_of
from tests.forked_children import fork_python_programs, run_program
from tests.quick_hydra import quicken

ROOT = Path(__file__).parents[1]
_SECONDS_TO_END = 10.0  # that ranks have after another one failed
PICTURES = "S2TRAIN_TEST_PICTURES"  # "1": pictures are drawn; else they are blank, which saves half a second each
# Variables that libraries read as they are imported: a separate server for each set of those that are "1".
FAKE_TE = "S2TRAIN_TEST_FAKE_TE"  # tests/megatron/fake_transformer_engine.py stands in for transformer-engine
_READ_AT_IMPORT = ("TRITON_INTERPRET", FAKE_TE)


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        program: path of a script, or a module's name.
        processes: ranks, with the variables that torchrun sets; 0: one process without them.
        out, err: files for what it says.
        timeout: seconds, then it is killed.
    """

    program: str
    arguments: Sequence[str]
    processes: int
    cwd: str
    environment: dict[str, str]
    out: str
    err: str
    timeout: float


def run_job(job: Job) -> int:
    """Run a job in a fork of the server; its status as that of a process or, for ranks, of torchrun."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(_server(tuple(name for name in _READ_AT_IMPORT if job.environment.get(name) == "1")))
        connection.sendall(json.dumps(asdict(job)).encode() + b"\n")
        answer = connection.makefile().readline()
    assert answer, "the server of tests/forked.py ended"
    status = json.loads(answer)
    if status is None:
        raise subprocess.TimeoutExpired(job.program, job.timeout)
    return int(status)


def forking_python(folder: Path) -> Path:
    """Make a program that is Python to those who start it, and has imported everything."""
    path = folder / "python"
    command = [sys.executable, "-S", str(ROOT / "tests" / "fork_client.py"), _server(())]
    path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    path.chmod(0o755)
    return path


@functools.cache
def _server(read_at_import: tuple[str, ...]) -> str:
    """Path of the socket of this test run's server, which the first worker to need it starts."""
    owner = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    # An earlier process had the same number, and a killed server of its tests left a socket.
    started = str(int(psutil.Process(owner).create_time()))
    path = Path(tempfile.gettempdir(), "-".join(("s2train-forks", str(owner), started, *read_at_import)))
    kept = {k: v for k, v in os.environ.items() if k not in _READ_AT_IMPORT} | {"OMP_NUM_THREADS": "1"}
    kept |= dict.fromkeys(read_at_import, "1")
    with FileLock(f"{path}.lock"):
        if not path.exists():
            command = [sys.executable, "-m", "tests.forked", "serve", str(path), str(owner)]
            null = subprocess.DEVNULL
            server = subprocess.Popen(command, cwd=ROOT, env=kept, stdin=null, stdout=null, stderr=null)
            while not path.exists():
                assert server.poll() is None, "the server of tests/forked.py did not start"
                time.sleep(0.05)
    return str(path)


def _import_everything() -> None:
    gc.disable()
    if os.environ.get(FAKE_TE) == "1":
        from tests.megatron import fake_transformer_engine

        fake_transformer_engine.install()
    else:
        from s2train.megatron.lazy_imports import import_megatron

        import_megatron()
    import wandb  # noqa: F401

    import s2train.command_line.program
    import s2train.needles.evaluate_checkpoint
    import s2train.planning.show
    import s2train.training.run  # noqa: F401
    from s2train.sweeps import plugins

    quicken()
    _compose_once()
    _draw_on_request()
    plugins.register()
    _fill_caches()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # what is imported need not be taken apart
    gc.enable()
    gc.collect()
    gc.freeze()  # so that a fork's garbage collector neither walks nor copies what was imported


def _fill_caches() -> None:
    """Fill what a program would fill at its start: caches of Hydra's parser, what runs record about the code."""
    from s2train.environment.versions import git_commit, source_digest
    from s2train.planning.compose import compose_run
    from s2train.training import metrics
    from tests.program import SMALL

    compose_run([*SMALL, "seed=1", "run_dir=/tmp/run-1_a", "optim.lr=1e-3", "+layout.kinds.E={kind:hyper,bucket:16}"])
    source_digest()
    git_commit()
    # Counting would copy the memory of every module to each fork.
    metrics.imported_modules = functools.cache(metrics.imported_modules)
    metrics.imported_modules()


def _compose_once() -> None:
    """Have Hydra compose settings once: before, it composes all to read `hydra.mode`, which no file here sets."""
    from hydra._internal.hydra import Hydra

    mode_of = Hydra.get_mode

    def get_mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        if {"-m", "--multirun"} & set(sys.argv) or any("hydra.mode" in override for override in overrides):
            return mode_of(self, config_name, overrides)
        return None

    Hydra.get_mode = get_mode  # type: ignore[method-assign]


def _draw_on_request() -> None:
    """Save blank pictures, unless a program's environment asks for those that it draws."""
    from matplotlib.figure import Figure
    from PIL import Image

    from s2train import pictures
    from s2train.training import layout_picture, plots

    def on_request(draw: Callable[..., Any], place: int) -> Callable[..., Any]:
        """`place` of the path among the arguments."""

        def drawn(*arguments: Any, **options: Any) -> None:
            if os.environ.get(PICTURES) == "1":
                draw(*arguments, **options)
            else:
                Image.new("L", (1, 1)).save(arguments[place], format="png")

        return drawn

    Figure.savefig = on_request(Figure.savefig, 1)  # type: ignore[method-assign]
    # The axes of a layout, which each training draws, alone take a tenth of a second.
    pictures.draw_layout = on_request(pictures.draw_layout, 2)
    layout_picture.start_process = lambda cfg, errors: None  # its imports take longer than these runs
    plots.draw_loss_curve = on_request(plots.draw_loss_curve, 1)


def _serve(path: Path, owner: psutil.Process) -> None:
    resource_tracker.ensure_running()  # else each program that saves a checkpoint starts one
    with socket.socket(socket.AF_UNIX) as listener:
        new = f"{path}.new"
        listener.bind(new)
        listener.listen(16)
        os.rename(new, path)
        listener.settimeout(1.0)
        while owner.is_running():  # not another process of its number
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                if os.fork() == 0:
                    _answer(connection)
                connection.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
    for name in (path, f"{path}.lock"):
        Path(name).unlink(missing_ok=True)


def _answer(connection: socket.socket) -> NoReturn:
    """Run what a connection asks for, in a fork of the server."""
    connection.settimeout(None)
    try:
        text, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
        while not text.endswith(b"\n"):
            text += connection.recv(1 << 16)
        request = json.loads(text)
        if streams:
            _stand_for(connection, streams, **request)
        else:
            connection.sendall(json.dumps(_run(Job(**request))).encode() + b"\n")
    finally:
        os._exit(0)


def _stand_for(
    connection: socket.socket, streams: list[int], command: list[str], cwd: str, environment: dict[str, str]
) -> None:
    """Fork a program for tests/fork_client.py: send its number and its status; kill it when the client is gone."""
    if (child := os.fork()) == 0:
        _enter(environment, cwd, streams)
        words = [word for word in command if word != "-u"]
        run_program(
            *((words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])), is_unbuffered="-u" in command
        )
    connection.sendall(b"%d\n" % child)
    connection.setblocking(False)
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if select.select([connection], [], [], 0.02)[0] and not connection.recv(1):
            first = psutil.Process(child)
            first.suspend()  # else it might start one more meanwhile
            for process in (*first.children(recursive=True), first):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            return
    connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(found[1]))


def _run(job: Job) -> int | None:
    with hold_port() as held:
        return _run_ranks(job, port_of(held))


def _run_ranks(job: Job, port: int) -> int | None:
    until = time.monotonic() + job.timeout
    running: dict[int, int] = {}
    for rank in range(max(1, job.processes)):
        if (child := os.fork()) == 0:
            _become(job, rank, port)
        running[child] = rank
    status, is_late = 0, False
    while running:
        child, ended = os.waitpid(-1, os.WNOHANG)
        if child:
            del running[child]
            code = os.waitstatus_to_exitcode(ended)
            if code and not status:
                status = 1 if job.processes else code
                until = min(until, time.monotonic() + _SECONDS_TO_END)
                for other in running:
                    os.kill(other, signal.SIGTERM)
        elif time.monotonic() > until:
            is_late |= not status
            for other in running:
                os.kill(other, signal.SIGKILL)
        else:
            time.sleep(0.01)
    return None if is_late else status


def _become(job: Job, rank: int, port: int) -> NoReturn:
    environment = dict(job.environment)
    if job.processes:
        ranks = str(job.processes)
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    _enter(
        environment,
        job.cwd,
        [os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) for path in (os.devnull, job.out, job.err)],
    )
    run_program(job.program, job.arguments)


def _enter(environment: dict[str, str], cwd: str, streams: Sequence[int]) -> None:
    """Give this fork a program's environment, folder, and stdin, stdout and stderr."""
    os.environ.clear()
    os.environ |= environment
    os.chdir(cwd)
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    fork_python_programs()


if __name__ == "__main__":
    _import_everything()
    if sys.argv[1] == "serve":
        _serve(Path(sys.argv[2]), psutil.Process(int(sys.argv[3])))
    else:
        fork_python_programs()
        run_program(sys.argv[1], sys.argv[2:])
