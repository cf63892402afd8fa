"""Run torchrun for a training job.

python launch/job.py --nproc-per-node 8 launch/pretrain.py +model=… [setting=value …]

Takes torchrun's arguments, and adds to torchrun:
- It prints the reason for the job's end in one line, where torchrun prints 40.
- It forwards SIGUSR1 to the ranks like SIGTERM. After a signal or Ctrl-C the ranks have ten minutes to save, instead of
  30 seconds. A second Ctrl-C kills them at once.
- If the run saved and stopped because of a signal, it exits with status 75 on every node, for a batch script to requeue
  (with 128 + the signal's number under checkpoint.save=false).
- If restarting the ranks can't help, it exits at once even under --max-restarts: with status 2 if the run was rejected,
  with 1 if its loss diverged. (torchrun itself exits with 1, or restarts the ranks.)
"""

import inspect
import os
import signal
import socket
import sys
import tempfile
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import _quick_imports  # pauses garbage collection
import _surroundings  # noqa: F401 (prints why the rest can't start)

import psutil
import torch
from torch.distributed.elastic.agent.server import WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import PContext, SignalException
from torch.distributed.elastic.multiprocessing import api as processes
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import api as rendezvous
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import config_from_args, parse_args, parse_min_max_nnodes
from torch.distributed.run import main as torchrun

from s2train.distributed.ports import hold_port, port_of
from s2train.distributed.torchrun_logs import without_log_folders
from s2train.errors import INTERRUPTED_STATUS, STATUS_FILE, USAGE_STATUS

_quick_imports.end()

DEFAULTS = {
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    "PET_SHUTDOWN_TIMEOUT": "600",
}


def main() -> int:
    """Run torchrun; returns the exit status."""
    if not sys.argv[1:]:
        print(f"{__doc__}\ntorchrun's own options: --help", file=sys.stderr)
        return USAGE_STATUS
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    extend_signal_handling()
    hold_signals_while_ranks_start()
    arguments = sys.argv[1:]
    options = parse_args(arguments)
    if problem := problem_of(options):
        print(f"error: {problem}", file=sys.stderr)
        return USAGE_STATUS
    if parse_min_max_nnodes(options.nnodes)[1] > 1:
        # torchrun's own store outlives its ranks: restarted ranks could find the addresses of the dead ones there, and
        # a node that rejoins would never learn its address (torch 2.13). So rank 0 creates a store in each round.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        hold_port_of_each_round()
    with (
        without_log_folders(options) as logs,
        tempfile.TemporaryDirectory(prefix="s2train_", ignore_cleanup_errors=True) as folder,
    ):
        return run_ranks([*logs, *arguments], Path(folder))


def problem_of(options: Namespace) -> str:
    """Return what is wrong with torchrun's options; empty if nothing is."""
    processes = options.nproc_per_node
    if processes.isdecimal() and int(processes) > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, which prints four lines about it
    if processes == "gpu" and not torch.cuda.is_available():
        problem = "--nproc-per-node=gpu (NPROC_PER_NODE is not set): torch sees no GPU"
        return f"{problem} on {socket.gethostname()}. Set it to the number of processes"
    try:
        given, _, _ = config_from_args(options)
        problem = "" if given.nproc_per_node > 0 else f"--nproc-per-node={processes}: not a number of processes"
    except ValueError as error:  # torchrun would print the stack
        problem = str(error)
    return f"{problem}. {Path(__file__).name} takes torchrun's options, see --help" if problem else ""


def run_ranks(arguments: list[str], folder: Path) -> int:
    """Run torchrun; returns the exit status.

    Ranks write their status and first error to `folder`.
    """
    status = folder / "status"
    os.environ[STATUS_FILE] = str(status)
    os.environ.setdefault("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))  # torchrun warns if unset
    try:
        torchrun(arguments)
    except SignalException as error:
        wait_for_ranks()
        if not status.exists():
            print(f"error: {error.sigval.name}: the ranks exited without saving", file=sys.stderr)
            return 128 + error.sigval
    except ChildFailedError as error:
        if line := failure(error):
            print(line, file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the ranks started
        print("interrupted", file=sys.stderr)
        return INTERRUPTED_STATUS
    return int(status.read_text()) if status.exists() else 0


def failure(error: ChildFailedError) -> str:
    """Describe this node's first failed rank; empty if it printed its error."""
    failed = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
    # torchrun terminated the others.
    rank, first = next((item for item in failed if item[1].exitcode != -signal.SIGTERM), failed[0])
    message = first.message["message"] if isinstance(first.message, dict) else ""
    if message.startswith("error: "):
        return ""
    end = first.signal_name() if first.exitcode < 0 else f"status {first.exitcode}"
    reason = f": {message}" if message else ""
    return f"error: rank {rank} on {socket.gethostname()} (local rank {first.local_rank}) exited with {end}{reason}"


def extend_signal_handling() -> None:
    """Let a second Ctrl-C kill the ranks, and respect PET_SHUTDOWN_TIMEOUT.

    torch before 2.13 kills the ranks 30 seconds after a signal.
    """
    close, is_patient = PContext.close, "shutdown_timeout" in inspect.signature(LaunchConfig).parameters

    def patient_close(self: PContext, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        stop = sys.exc_info()[1]
        if isinstance(stop, SignalException):  # after a failure instead, other ranks may hang: they keep 30 seconds
            timeout = timeout if is_patient else int(os.environ["PET_SHUTDOWN_TIMEOUT"])
            if stop.sigval == signal.SIGINT:
                signal.signal(signal.SIGINT, kill_ranks)
        close(self, death_sig, timeout)

    PContext.close = patient_close  # type: ignore[method-assign]


def hold_signals_while_ranks_start() -> None:
    """Raise a signal that arrives while ranks start once all have started.

    Torchrun stores its ranks after it has started the last: it would neither forward the signal to the others nor end
    them. A second Ctrl-C kills those that have started, and ends the job at once.
    """
    start, handle = LocalElasticAgent._start_workers, processes._terminate_process_handler
    is_starting, held = False, list[int]()

    def hold(number: int, frame: FrameType | None) -> None:
        if is_starting and number == signal.SIGINT and number in held:
            held.clear()
            kill_ranks(number, frame)
        elif is_starting:
            held.append(number)
            return
        handle(number, frame)

    def start_whole(self: LocalElasticAgent, group: WorkerGroup) -> dict[int, Any]:
        nonlocal is_starting
        is_starting = True
        try:
            return start(self, group)
        finally:
            is_starting = False
            if held:
                handle(held[0], None)

    processes._terminate_process_handler = hold
    LocalElasticAgent._start_workers = start_whole  # type: ignore[method-assign]


def hold_port_of_each_round() -> None:
    """Hold the port of a round's store until rank 0 listens there.

    torch chooses it and closes it at once: another program could take it while rank 0 imports.
    """
    held = list[socket.socket]()

    def get_held_port() -> int:
        held[:] = [hold_port()]  # frees the last round's
        return port_of(held[0])

    rendezvous.get_free_port = get_held_port


def kill_ranks(number: int, frame: FrameType | None) -> None:
    """Kill the ranks and their child processes; completed checkpoints stay valid."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def wait_for_ranks() -> None:
    """Wait for the ranks to exit, even if further signals arrive.

    A second signal ends torchrun's own waiting.
    """
    for name in DEFAULTS["PET_SIGNALS_TO_HANDLE"].split(","):
        signal.signal(signal.Signals[name], kill_ranks if name == "SIGINT" else signal.SIG_IGN)
    psutil.wait_procs(psutil.Process().children(), timeout=float(os.environ["PET_SHUTDOWN_TIMEOUT"]))


if __name__ == "__main__":
    sys.exit(main())
