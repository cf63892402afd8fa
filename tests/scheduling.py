"""Which tests share a worker."""

from functools import cache
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling


class SharedFixtures(LoadScopeScheduling):  # type: ignore[misc, unused-ignore]
    """Tests of a file that makes something once for all of them run in one worker; others run anywhere.

    It makes it in a fixture of the module, or in a function whose results are kept. Tests that wait share a worker too:
    otherwise all workers would wait at once.
    """

    def _split_scope(self, nodeid: str) -> str:
        file, _, _ = nodeid.partition("::")
        return file if _shares(file) else nodeid


@cache
def _shares(file: str) -> bool:
    text = (Path(__file__).parents[1] / file).read_text()
    return any(words in text for words in ('scope="module"', "\n@cache\n", "mark.xdist_group("))
