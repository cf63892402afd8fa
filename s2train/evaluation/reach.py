"""Can a model's layout carry a needle to its question at all, and through how many layers?"""

from functools import lru_cache

from s2train.data.task_samples import TaskSampler
from s2train.evaluation.needle import NeedleGrid
from s2train.evaluation.results import CellReach
from s2train.layouts.hybrid import HybridLayout
from s2train.layouts.reachability import NEVER, Reach, reach


class NeedleReach:
    """Layers between the needles of a grid's cells and the positions that their answers are read from."""

    def __init__(self, hybrid: HybridLayout, sampler: TaskSampler, grid: NeedleGrid) -> None:
        self._hybrid, self._sampler, self._grid = hybrid, sampler, grid
        self._reach = lru_cache(maxsize=16)(self._reach_uncached)

    def __call__(self, length: int, depth: float) -> CellReach:
        """Of the trial and the needle that need the most: from the needle's ends to the last token of the question.

        A chain of needles may go from one to the next on the way, which this does not ask of it.
        """
        first: list[int | None] = []
        last: list[int | None] = []
        for trial in range(self._grid.trials):
            sample = self._grid.sample(self._sampler, length, depth, trial)
            found = self._reach(length, len(sample.prompt) - 1)
            for start, stop in sample.spans:
                first += [found.layers_from_first(start), found.layers_from_first(stop - 1)]
                last += [found.layers_from_last(start), found.layers_from_last(stop - 1)]
        return CellReach(_most(first), _most(last))

    def _reach_uncached(self, length: int, query: int) -> Reach:
        return reach(self._hybrid, length, query)


def _most(counts: list[int | None]) -> int:
    return NEVER if None in counts else max(count for count in counts if count is not None)
