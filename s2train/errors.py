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
    """A run that can't go on, told in one line."""
