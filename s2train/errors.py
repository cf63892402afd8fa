"""The one error class for bad input."""


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


class StoppedBySignal(Exception):
    """A run that has saved and ends because the scheduler asked it to; to be started again.

    Args:
        signal: its name, e.g. ``SIGTERM``.
        step: steps done.
        checkpoint: where they are saved.
    """

    def __init__(self, signal: str, step: int, checkpoint: str) -> None:
        super().__init__(f"stopped by {signal} at step {step} | checkpoint {checkpoint} | the same command goes on")
