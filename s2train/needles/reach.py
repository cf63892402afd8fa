"""Computes how many layers carry a needle to its question."""

from functools import lru_cache

from s2train.attention.hybrid import HybridLayout
from s2train.attention.reachability import NEVER, Reach, direct_heads, reach
from s2train.needles.results import CellReach
from s2train.needles.retrieval import NeedleGrid
from s2train.needles.samples import TaskSampler


class NeedleReach:
    """Computes the reach of a grid's cells.

    That is the number of layers between needles and the questions' ends.
    """

    def __init__(self, hybrid: HybridLayout, sampler: TaskSampler, grid: NeedleGrid) -> None:
        self._hybrid, self._sampler, self._grid = hybrid, sampler, grid
        self._reach = lru_cache(maxsize=16)(self._reach_uncached)

    def __call__(self, length: int, depth: float) -> CellReach:
        """Compute the reach of a cell.

        Takes the trial and the needle that need the most layers. Counts layers from each block of a needle to the
        question's last token. For a chain of needles, the path need not go from one needle to the next.
        """
        first: list[int | None] = []
        last: list[int | None] = []
        heads: list[int] = []
        for trial in range(self._grid.trials):
            sample = self._grid.sample(self._sampler, length, depth, trial)
            query = len(sample.prompt) - 1
            found = self._reach(length, query)
            for start, stop in sample.spans:
                keys = [*range(start, stop, self._hybrid.block_size), stop - 1]
                first += map(found.layers_from_first, keys)
                last += map(found.layers_from_last, keys)
                heads.append(direct_heads(self._hybrid, query, keys))
        return CellReach(_most(first), _most(last), min(heads), self._hybrid.heads.total())

    def _reach_uncached(self, length: int, query: int) -> Reach:
        return reach(self._hybrid, length, query)


def _most(counts: list[int | None]) -> int:
    return NEVER if None in counts else max(count for count in counts if count is not None)
