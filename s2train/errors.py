"""Errors that users see in one line, and exit statuses for launchers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from signal import Signals

# A run saved and stopped on request (a time limit, a preemption); the same command resumes it. Equals sysexits.h's
# "temporary failure". torchrun itself would exit with 1; `launch/job.py` passes this status on.
EXIT_REQUEUE = 75
USAGE_STATUS = 2
INTERRUPTED_STATUS = 130  # after Ctrl-C, as a shell reports it
# Environment variable with the path of a file. If set, a rank that exits together with all others for a reason that no
# restart fixes (a signal, rejected settings, a diverged loss) writes its status there and exits with 0: torchrun would
# restart the ranks after any other status, or report it as 1. `launch/job.py` sets it.
STATUS_FILE = "S2TRAIN_STATUS_FILE"


def first_line(error: BaseException) -> str:
    """Format an error's type and the first line of its message."""
    kind = type(error).__name__
    return f"{kind}: {message_line(error)}" if str(error).strip() else kind


def message_line(error: BaseException) -> str:
    """Return the first line of an error's message, or else its type."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def as_typed(value: object) -> str:
    """Format a setting's value as on the command line: null, true, [a,b]."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{as_typed(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(as_typed, value)) + "]"
    return str(value)


def from_to(first: int, last: int) -> str:
    """Format a range of values: "1 … 13", or "1" alone."""
    return str(first) if first == last else f"{first} … {last}"


class ConfigError(ValueError):
    """A setting that can't work: name, value, problem and remedy, one line.

    Args:
        setting: dotted name as typed on the command line, e.g. ``parallel.tp``.
        value: what it is set to.
        problem: why this can't work.
        remedy: what to set instead.
    """

    def __init__(self, setting: str, value: object, problem: str, remedy: str) -> None:
        self.setting, self.value, self.problem, self.remedy = setting, value, problem, remedy
        super().__init__(f"{self.given}: {problem}. {remedy}")

    @property
    def given(self) -> str:
        """The setting and its value, as typed."""
        return f"{self.setting}={as_typed(self.value)}"

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[str, object, str, str]]:
        """Pickle the four arguments, so that worker processes can raise it."""
        return ConfigError, (self.setting, self.value, self.problem, self.remedy)


class TrainingError(RuntimeError):
    """A run that can't continue, reported in one line.

    Either all ranks raise it together, or rank 0 alone.
    """


class DivergedError(TrainingError):
    """Too many steps in a row had no finite loss or gradient.

    All ranks raise it; a restart would repeat it.
    """


class StoppedBySignal(Exception):
    """A run that saved and stops at the scheduler's request; resumable.

    Attributes:
        status: exit status: EXIT_REQUEUE, or 128 + the signal's number, as in a shell, if nothing was saved.

    Args:
        signal: its name, e.g. ``SIGTERM``.
        step: steps done.
        checkpoint: the last one; None with checkpoint.save=false.
    """

    def __init__(self, signal: str, step: int, checkpoint: Path | None) -> None:
        self.status = EXIT_REQUEUE if checkpoint else 128 + Signals[signal]
        saved = (
            f"checkpoint {checkpoint} | the same command resumes" if checkpoint else "not saved: checkpoint.save=false"
        )
        super().__init__(f"stopped by {signal} at step {step} | {saved}")


class StartUpError(RuntimeError):
    """A job that can't start; one line per problem.

    Either a rank rejects its settings, or ranks differ. All ranks raise it together, and a restart would repeat it,
    except for a `MissingRankError`.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(problems))


class MissingRankError(StartUpError):
    """Ranks that did not start.

    Only rank 0 raises it, and a restart may help.
    """
