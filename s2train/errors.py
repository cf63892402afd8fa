"""Errors told to users in one line each, and the exit statuses that a launcher reads."""

from collections.abc import Sequence
from pathlib import Path
from signal import Signals

# Of a run that saved and stopped because it was asked to (a time limit, a preemption): start it again to go on.
# sysexits.h's "temporary failure". torchrun itself would end with 1; `launch/job.py` hands it on.
EXIT_REQUEUE = 75
USAGE_STATUS = 2
INTERRUPTED_STATUS = 130  # of Ctrl-C, as a shell reports it
# Names a file. If set, a rank that ends as all ranks do, for what no restart mends (a signal, a refusal, a loss that
# diverged), writes its status there and ends with 0: torchrun takes any other for a failure, which it would restart
# or report as its own 1. `launch/job.py` sets it.
STATUS_FILE = "S2TRAIN_STATUS_FILE"


class ConfigError(ValueError):
    """A setting that can't work, told in one line: which setting, its value, why, and the remedy.

    Args:
        setting: dotted name as typed on the command line, e.g. ``parallel.tp``.
        value: what it is set to.
        problem: why that can't work.
        remedy: what to set instead.
    """

    def __init__(self, setting: str, value: object, problem: str, remedy: str) -> None:
        self.setting, self.value, self.problem, self.remedy = setting, value, problem, remedy
        super().__init__(f"{setting}={value}: {problem}. {remedy}")


class TrainingError(RuntimeError):
    """A run that can't go on, told in one line. All ranks raise it together, unless rank 0 does alone."""


class DivergedError(TrainingError):
    """Too many steps in a row had a loss or gradient that is not finite. All ranks raise it; a restart repeats it."""


class StoppedBySignal(Exception):
    """A run that has saved and ends because the scheduler asked it to; to be started again.

    Attributes:
        status: to end with: EXIT_REQUEUE, or, where nothing was saved, a shell's 128 + the signal's number.

    Args:
        signal: its name, e.g. ``SIGTERM``.
        step: steps done.
        checkpoint: where they are saved; None with checkpoint.save=false.
    """

    def __init__(self, signal: str, step: int, checkpoint: Path | None) -> None:
        self.status = EXIT_REQUEUE if checkpoint else 128 + Signals[signal]
        saved = (
            f"checkpoint {checkpoint} | the same command resumes" if checkpoint else "not saved: checkpoint.save=false"
        )
        super().__init__(f"stopped by {signal} at step {step} | {saved}")


class StartUpError(RuntimeError):
    """A job that can't start: what a rank refuses, or ranks that don't go together; one line for each problem.

    All ranks raise it together, and a restart would repeat it, but for a `MissingRankError`.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(problems))


class MissingRankError(StartUpError):
    """Ranks that never came. Rank 0 raises it alone, and a restart may bring them."""
