"""Counts skipped steps and detects loss spikes."""

from dataclasses import dataclass, replace

_MEAN_OVER = 100  # the running mean averages over about this many steps
_SETTLED = 20  # no spike is reported before this many steps


@dataclass(frozen=True)
class LossHistory:
    """Counts of skipped steps and the running mean loss of a run.

    Saved in the checkpoint, so that a resumed run continues the counts.

    Attributes:
        skipped: skipped steps in total.
        skipped_in_row: skipped steps since the last step that was taken.
        steps: steps taken.
        mean_loss: exponential mean of their losses, in nats per token.
    """

    skipped: int = 0
    skipped_in_row: int = 0
    steps: int = 0
    mean_loss: float = 0.0

    def after_skip(self) -> "LossHistory":
        """Count one more skipped step."""
        return replace(self, skipped=self.skipped + 1, skipped_in_row=self.skipped_in_row + 1)

    def after_step(self, loss: float) -> "LossHistory":
        """Count one more step that was taken.

        The mean of the first steps is the arithmetic mean.
        """
        steps = self.steps + 1
        mean = self.mean_loss + (loss - self.mean_loss) / min(steps, _MEAN_OVER)
        return replace(self, skipped_in_row=0, steps=steps, mean_loss=mean)

    def spike(self, loss: float, factor: float) -> float | None:
        """Ratio of a loss to the mean, or None below `factor`."""
        if self.steps < _SETTLED or loss < factor * self.mean_loss:
            return None
        return loss / self.mean_loss
