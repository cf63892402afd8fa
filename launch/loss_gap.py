"""Compare losses of finished runs: `python launch/loss_gap.py BASE_RUN RUN … [--output FILE.json]`."""

import argparse
from dataclasses import asdict
from pathlib import Path

import _surroundings  # noqa: F401 (prints why the rest can't start)

from rich.console import Console

from s2train.command_line.program import run_command
from s2train.comparison.loss_gap import gaps, table
from s2train.files import output_stem, write_json


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    run_command(lambda: show(given.base, given.runs, given.output))


def show(base: Path, runs: list[Path], output: Path | None) -> None:
    """Print the table, and write it to a file if given."""
    found = gaps(base, runs)
    Console(width=100).print(table(base, found))
    if output is not None:
        stem = output_stem(output, "--output")
        content = {"base": base.name, "runs": [asdict(gap) for gap in found]}
        write_json(stem.with_name(stem.name + ".json"), content)


if __name__ == "__main__":
    main()
