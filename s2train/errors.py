"""Errors told to users in one line each, and the exit status that a launcher reads."""

from collections.abc import Sequence

# Of a run that saved and stopped because it was asked to (a time limit, a preemption): start it again to go on.
# sysexits.h's "temporary failure". launch/multinode.sh and launch/slurm/run.sh ask this file for it.
EXIT_REQUEUE = 75


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
    """A run that can't go on, told in one line."""


class StartUpError(RuntimeError):
    """A job whose ranks don't go together; one line for each problem, naming rank, host and remedy."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(problems))
