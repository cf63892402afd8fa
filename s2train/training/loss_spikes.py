"""Steps whose loss or gradient is not finite, and losses that jump."""

from dataclasses import dataclass, replace

_MEAN_OVER = 100  # steps that the running mean remembers, about
_SETTLED = 20  # steps before it means something


@dataclass(frozen=True)
class Health:
    """How a run has fared; saved with it, so that a resumed run counts on.

    Attributes:
        skipped, skipped_in_row: steps that changed nothing, in all and up to now without a break.
        steps, mean_loss: steps taken, and the exponential mean of their losses, nats per token.
    """

    skipped: int = 0
    skipped_in_row: int = 0
    steps: int = 0
    mean_loss: float = 0.0

    def after_skip(self) -> "Health":
        """After one more step that was skipped."""
        return replace(self, skipped=self.skipped + 1, skipped_in_row=self.skipped_in_row + 1)

    def after_step(self, loss: float) -> "Health":
        """After one more step that was taken. A mean of the first steps is a plain one."""
        steps = self.steps + 1
        mean = self.mean_loss + (loss - self.mean_loss) / min(steps, _MEAN_OVER)
        return replace(self, skipped_in_row=0, steps=steps, mean_loss=mean)

    def spike(self, loss: float, factor: float) -> float | None:
        """How many times the running mean a loss is, where that is `factor` or more."""
        if self.steps < _SETTLED or loss < factor * self.mean_loss:
            return None
        return loss / self.mean_loss
