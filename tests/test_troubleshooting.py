"""docs/troubleshooting.md: its errors are those of the code, with the remedies that settings have."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from s2train.errors import ConfigError
from s2train.planning import check, compose_run
from s2train.planning.targets import target_gpu
from tests.program import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
QUOTES = re.findall(r"^### `(.+)`$", PAGE.read_text(), re.M)
# Settings and processes that raise some of them.
RAISED: dict[str, tuple[list[str], int]] = {
    "the model takes tp": (["+model=tiny_hybrid", "parallel.tp=2"], 1),
    "doesn't divide": (["+model=tiny_hybrid", "parallel.tp=3"], 3),
    "… data parallel ranks": (["+model=tiny_hybrid", "train.global_batch_size=7"], 2),
    "… needs … GiB": (["+model=7b_hybrid", "parallel.tp=1", "parallel.sequence_parallel=false"], 1),
    "… of the causal blocks": (["+model=tiny_hybrid", "schedule=homogeneous", "train.seq_length=4096"], 1),
    "parallel.cp=…": (["+model=tiny_hybrid", "parallel.cp=2", "train.seq_length=264"], 2),
}


def test_no_error_is_listed_twice() -> None:
    assert len(QUOTES) == len(set(QUOTES)) > 0


@pytest.mark.parametrize("quote", QUOTES)
def test_an_error_of_the_page_is_a_text_of_the_code(quote: str) -> None:
    assert any(quote in text for text in texts())


@pytest.mark.parametrize("start", RAISED)
def test_an_error_of_the_page_is_raised_as_it_is_quoted(start: str) -> None:
    (quote,) = (quote for quote in QUOTES if quote.startswith(start))
    settings, processes = RAISED[start]
    with pytest.raises(ConfigError, match=re.escape(quote).replace("…", ".+")):
        check(compose_run(settings), processes, target_gpu("h100-80gb"))


@cache
def texts() -> frozenset[str]:
    """Every string of the code but docstrings, with … for what is filled in."""
    files = (path for folder in ("s2train", "launch") for path in (ROOT / folder).rglob("*.py"))
    return frozenset(text for path in files for text in strings(path))


def strings(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) in docstrings:
            continue
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
