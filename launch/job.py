"""torchrun for schedulers: `python launch/job.py --nproc-per-node 8 launch/pretrain.py +model=… [setting=value …]`.

Takes torchrun's arguments, and does what torchrun alone does not: SIGUSR1 reaches the ranks as SIGTERM does; they have
ten minutes to save, not half a minute; a run that saved and stopped for a signal ends with status 75, on every node,
for a batch script to requeue (with 128 + the signal's number under checkpoint.save=false); and what starting the ranks
again can't mend ends at once under --max-restarts too, with status 2 if the run was refused and 1 if its loss diverged.
(torchrun itself ends with 1, or starts the ranks again.)
"""

import inspect
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

import psutil
import torch
from torch.distributed.elastic.multiprocessing import PContext, SignalException
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import main as torchrun
from torch.distributed.run import parse_args

from s2train.command_line import STATUS_FILE, USAGE_STATUS

DEFAULTS = {
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    "PET_SHUTDOWN_TIMEOUT": "600",
    # torchrun's own store outlives its ranks: they would find the addresses of the dead ones there, and a node that
    # comes back would never learn its address (torch 2.13). So rank 0 makes a store in each round.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


def main() -> int:
    """Run torchrun; returns the status to end with."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if "shutdown_timeout" not in inspect.signature(LaunchConfig).parameters:
        wait_after_signals()
    if parse_args(sys.argv[1:]).nproc_per_node == "gpu" and not torch.cuda.is_available():
        told = "--nproc-per-node=gpu (NPROC_PER_NODE is not set): torch sees no GPU"
        print(f"error: {told} on {socket.gethostname()}. Set it to the number of processes", file=sys.stderr)
        return USAGE_STATUS
    with tempfile.TemporaryDirectory(prefix="s2train_") as folder:
        status = Path(folder) / "status"
        os.environ[STATUS_FILE] = str(status)
        try:
            torchrun(sys.argv[1:])
        except SignalException as error:
            wait_for_ranks()
            if not status.exists():
                print(f"error: {error}; the ranks ended without saving", file=sys.stderr)
                return 128 + error.sigval
        return int(status.read_text()) if status.exists() else 0


def wait_after_signals() -> None:
    """Make a torch before 2.13, which kills ranks half a minute after a signal, heed PET_SHUTDOWN_TIMEOUT."""
    close = PContext.close

    def patient_close(self: PContext, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        if isinstance(sys.exc_info()[1], SignalException):  # a failed rank's peers may hang: they have half a minute
            timeout = int(os.environ["PET_SHUTDOWN_TIMEOUT"])
        close(self, death_sig, timeout)

    PContext.close = patient_close  # type: ignore[method-assign]


def wait_for_ranks() -> None:
    """Let ranks that are at work yet end by themselves: a second signal ends torchrun's own waiting."""
    for name in DEFAULTS["PET_SIGNALS_TO_HANDLE"].split(","):
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    psutil.wait_procs(psutil.Process().children(), timeout=float(os.environ["PET_SHUTDOWN_TIMEOUT"]))


if __name__ == "__main__":
    sys.exit(main())
