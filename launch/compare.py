"""Compare finished runs.

`python launch/compare.py OUTPUT RUN_DIR RUN_DIR …` writes OUTPUT.json and .png.
"""

import argparse
import os
from pathlib import Path

import _surroundings  # noqa: F401 (prints why the rest can't start)

from rich.console import Console

from s2train.command_line.program import run_command
from s2train.comparison.runs import compare
from s2train.files import describe_output


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--command", default=os.environ.get("S2TRAIN_COMMAND", ""), help="command that made the runs")
    given = parser.parse_args()
    run_command(lambda: report(given))


def report(given: argparse.Namespace) -> None:
    """Compare, and print the table."""
    Console(width=140).print(compare(given.runs, given.output, given.command))
    print(describe_output(given.output))


if __name__ == "__main__":
    main()
