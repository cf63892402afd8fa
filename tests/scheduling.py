"""Which tests share a worker."""

from functools import cache
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling


class SharedFixtures(LoadScopeScheduling):  # type: ignore[misc, unused-ignore]
    """Tests of a file that makes something once for all of them run in one worker; others run anywhere."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, _ = nodeid.partition("::")
        return file if _shares(file) else nodeid


@cache
def _shares(file: str) -> bool:
    return 'scope="module"' in (Path(__file__).parents[1] / file).read_text()
