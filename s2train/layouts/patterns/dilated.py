"""Pattern of regularly spaced distances."""

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from s2train.layouts.patterns.base import DistancePattern, PatternError, at_least


@dataclass(frozen=True)
class Dilated(DistancePattern):
    """Keep a local window and regularly spaced distances.

    Keeps distances d < local, and d with (d - offset) mod dilation = 0. With `window`, only distances below it are
    kept. The kept keys move with the query, so the pattern isn't KV-efficient. The offset is stored modulo the
    dilation.

    Raises:
        PatternError: local or dilation below 1, or a window below local.
    """

    local: int
    dilation: int
    offset: int
    window: int | None = None

    def __post_init__(self) -> None:
        at_least(1, local=self.local, dilation=self.dilation)
        if self.window is not None and self.window < self.local:
            raise PatternError("window", self.window, f"below local={self.local}", f"Set it to {self.local} or more.")
        object.__setattr__(self, "offset", self.offset % self.dilation)

    def distances(self, distance: Tensor) -> Tensor:
        far = (distance - self.offset) % self.dilation == 0
        if self.window is not None:
            far &= distance < self.window
        return (distance < self.local) | far

    @property
    def kv_efficient(self) -> bool:
        if self.dilation == 1:
            return True
        # The kept distances have no gap: none beyond the window, or the next one right after it.
        next_far = self.local + (self.offset - self.local) % self.dilation
        if self.window is None:
            return False
        return next_far >= self.window or (next_far == self.local and next_far + self.dilation >= self.window)

    @property
    def period(self) -> int:
        return self.dilation

    def shifted(self, offset: int) -> Self:
        return replace(self, offset=offset)

    def form(self) -> str:
        window = f", window {self.window}" if self.window is not None else ""
        return f"local {self.local}, dilation {self.dilation}{window}"

    def describe(self) -> str:
        return f"{self.form()}, offset {self.offset}"

    def narrower(self, widest: int) -> str:
        return f"dilation={widest} or less"
