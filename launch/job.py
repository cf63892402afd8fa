"""torchrun as a run wants it: `python launch/job.py --nproc-per-node 8 launch/pretrain.py +model=… [setting=value …]`.

Takes torchrun's arguments, and does what torchrun alone does not:
- it prints what ended the job in one line, where torchrun prints 40 of its own;
- SIGUSR1 reaches the ranks as SIGTERM does, and after a signal or Ctrl-C they have ten minutes to save, not half a one;
  a second Ctrl-C ends them at once;
- a run that saved and stopped for a signal ends with status 75, on every node, for a batch script to requeue (with
  128 + the signal's number under checkpoint.save=false);
- what starting the ranks again can't mend ends at once under --max-restarts too, with status 2 if the run was rejected
  and 1 if its loss diverged. (torchrun itself ends with 1, or starts the ranks again.)
"""

import inspect
import os
import signal
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import FrameType

import _surroundings  # noqa: F401 (prints why the rest can't start)

import psutil
import torch
from torch.distributed.elastic.multiprocessing import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import config_from_args, parse_args
from torch.distributed.run import main as torchrun

from s2train.errors import INTERRUPTED_STATUS, STATUS_FILE, USAGE_STATUS

DEFAULTS = {
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    "PET_SHUTDOWN_TIMEOUT": "600",
    # torchrun's own store outlives its ranks: they would find the addresses of the dead ones there, and a node that
    # comes back would never learn its address (torch 2.13). So rank 0 makes a store in each round.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


def main() -> int:
    """Run torchrun; returns the status to end with."""
    if not sys.argv[1:]:
        print(f"{__doc__}\ntorchrun's own options: --help", file=sys.stderr)
        return USAGE_STATUS
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    heed_signals()
    processes = parse_args(sys.argv[1:]).nproc_per_node
    if processes.isdecimal() and int(processes) > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, with four lines on it
    if processes == "gpu" and not torch.cuda.is_available():
        told = "--nproc-per-node=gpu (NPROC_PER_NODE is not set): torch sees no GPU"
        print(f"error: {told} on {socket.gethostname()}. Set it to the number of processes", file=sys.stderr)
        return USAGE_STATUS
    try:
        given, _, _ = config_from_args(parse_args(sys.argv[1:]))
        problem = "" if given.nproc_per_node > 0 else f"--nproc-per-node={processes}: not a number of processes"
    except ValueError as error:  # torchrun would print its stack
        problem = str(error)
    if problem:
        print(f"error: {problem}. {Path(__file__).name} takes torchrun's options, see --help", file=sys.stderr)
        return USAGE_STATUS
    with tempfile.TemporaryDirectory(prefix="s2train_") as folder:
        status = Path(folder) / "status"
        os.environ[STATUS_FILE] = str(status)
        os.environ.setdefault("TORCHELASTIC_ERROR_FILE", str(Path(folder) / "error.json"))  # it complains without
        try:
            torchrun(sys.argv[1:])
        except SignalException as error:
            wait_for_ranks()
            if not status.exists():
                print(f"error: {error.sigval.name}: the ranks ended without saving", file=sys.stderr)
                return 128 + error.sigval
        except ChildFailedError as error:
            if line := failure(error):
                print(line, file=sys.stderr)
            return 1
        except KeyboardInterrupt:  # before there were ranks
            print("interrupted", file=sys.stderr)
            return INTERRUPTED_STATUS
        return int(status.read_text()) if status.exists() else 0


def failure(error: ChildFailedError) -> str:
    """One line on the rank of this node that ended first; empty if it has printed why."""
    failed = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
    # Of the others torchrun made an end.
    rank, first = next((item for item in failed if item[1].exitcode != -signal.SIGTERM), failed[0])
    message = first.message["message"] if isinstance(first.message, dict) else ""
    if message.startswith("error: "):
        return ""
    end = first.signal_name() if first.exitcode < 0 else f"status {first.exitcode}"
    reason = f": {message}" if message else ""
    return f"error: rank {rank} on {socket.gethostname()} (local rank {first.local_rank}) ended with {end}{reason}"


def heed_signals() -> None:
    """Let a second Ctrl-C end the ranks at once, and a torch before 2.13 heed PET_SHUTDOWN_TIMEOUT.

    That torch kills the ranks half a minute after a signal.
    """
    close, is_patient = PContext.close, "shutdown_timeout" in inspect.signature(LaunchConfig).parameters

    def patient_close(self: PContext, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        stop = sys.exc_info()[1]
        if isinstance(stop, SignalException):  # a failed rank's peers may hang: they have half a minute
            timeout = timeout if is_patient else int(os.environ["PET_SHUTDOWN_TIMEOUT"])
            if stop.sigval == signal.SIGINT:
                signal.signal(signal.SIGINT, kill_ranks)
        close(self, death_sig, timeout)

    PContext.close = patient_close  # type: ignore[method-assign]


def kill_ranks(number: int, frame: FrameType | None) -> None:
    """End the ranks and what they started, now. What they saved is whole."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def wait_for_ranks() -> None:
    """Let ranks that are at work yet end by themselves: a second signal ends torchrun's own waiting."""
    for name in DEFAULTS["PET_SIGNALS_TO_HANDLE"].split(","):
        signal.signal(signal.Signals[name], kill_ranks if name == "SIGINT" else signal.SIG_IGN)
    psutil.wait_procs(psutil.Process().children(), timeout=float(os.environ["PET_SHUTDOWN_TIMEOUT"]))


if __name__ == "__main__":
    sys.exit(main())
