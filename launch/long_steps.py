"""Measure step times of hybrid and dense models at long sequences.

python launch/long_steps.py OUTPUT --lengths 8k 32k

Writes OUTPUT.json and OUTPUT.png and prints a table. An interrupted measurement resumes: results in OUTPUT.json are not
measured again, and those of other settings are rejected. Each variant uses its fastest installed kernels;
`--layouts DSSS D1S7` selects the hybrids' layers. Arguments `setting=value`, such as model.vocab_size=8192, apply to
every run. The runs save no checkpoints.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

import _surroundings  # noqa: F401 (prints why the rest can't start)

from rich.console import Console

from s2train.command_line.messages import warn
from s2train.command_line.program import run_command, settings_before_options, tokens
from s2train.comparison.long_steps import Request, measure_all, serve_cases
from s2train.comparison.long_steps_report import draw, table
from s2train.comparison.stacks import stacks_to_compare
from s2train.environment.hardware import detect_own
from s2train.environment.provenance import environment
from s2train.errors import ConfigError
from s2train.files import output_stem


def layers(text: str) -> int | None:
    """Parse a number, or auto as None."""
    return None if text == "auto" else int(text)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("overrides", nargs="*", help="settings of every run")
    parser.add_argument("--size", default="7b", help="model size: SIZE_hybrid and SIZE_dense of conf/model")
    parser.add_argument(
        "--lengths", type=tokens, nargs="+", default=[8192, 32768, 131072], help="sequence lengths, such as 8k 32k"
    )
    parser.add_argument("--tokens", type=tokens, default=131072, help="tokens per step")
    parser.add_argument("--layers", type=layers, default=None, help="number of layers, or auto: the most that fit")
    parser.add_argument("--steps", type=int, default=7, help="measured steps")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them, which compile and tune")
    parser.add_argument("--layouts", nargs="+", default=["DSSS"], help="layer strings of the hybrids, such as D1S7")
    parser.add_argument("--variants", nargs="+", help="names of the variants to measure; default: all")
    parser.add_argument("--ways", nargs="+", help=argparse.SUPPRESS)  # the earlier name of --variants
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_intermixed_args(settings_before_options(sys.argv[1:]))
    if given.ways is not None:
        warn("--ways is now --variants")
        given.variants = given.ways
    run_command(serve_cases if given.serve else lambda: measure_and_show(given))


def measure_and_show(given: argparse.Namespace) -> None:
    """Measure missing results, and show all."""
    output = output_stem(given.output)
    console = Console(width=int(os.environ.get("COLUMNS", "160")))
    request = Request(
        given.size,
        given.lengths,
        given.tokens,
        given.layers,
        given.steps,
        given.warmup,
        given.overrides,
        given.layouts,
    )
    stacks = stacks_to_compare(detect_own(), given.layouts)
    if given.variants is not None:
        if unknown := sorted(set(given.variants) - {stack.name for stack in stacks}):
            names = ", ".join(stack.name for stack in stacks)
            raise ConfigError("--variants", unknown[0], "unknown or unavailable here", f"Choose from: {names}.")
        stacks = [stack for stack in stacks if stack.name in given.variants]
    made_by = {"command": shlex.join(["python", *sys.argv]), **environment()}
    serving = [str(Path(__file__).resolve()), str(output), "--serve"]
    rows = measure_all(request, stacks, output, serving, made_by, lambda text: print(text, flush=True))
    if not rows:
        raise ConfigError("output", given.output, "nothing was measured", "See the failures above")
    console.print(table(rows))
    draw(rows, output.with_name(output.name + ".png"), f"layers of {given.size}")


if __name__ == "__main__":
    main()
