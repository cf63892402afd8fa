"""Docstrings begin with a short line that says what a thing does."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("s2train", "launch", "kernels")
MOST_WORDS = 12


def long_first_lines(*folders: str) -> Iterator[str]:
    """Yield file, line and first line of docstrings that begin too long."""
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            if len(first.split()) > MOST_WORDS:
                yield f"{path.relative_to(ROOT)}:{node.body[0].lineno}: {first}"


def test_first_lines_of_docstrings_are_short() -> None:
    found = list(long_first_lines(*FOLDERS))
    assert not found, "\n".join([f"docstrings whose first line has more than {MOST_WORDS} words:", *found])
