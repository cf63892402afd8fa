"""Measure held-out perplexity with a trained model's last layers replaced by HyperAttention.

python launch/replace_layers.py runs/tiny_dense bucket=32 shortest=64 window=16 sinks=16 --last 1 2 --output OUT

The model is not trained after the replacement. Words such as bucket=32 are settings of HyperAttention
(docs/hyperattention.md). Writes OUT.json and OUT.png. Run it again to resume it, or with further layers and samples to
add them.
"""

import argparse
from pathlib import Path

import _surroundings  # noqa: F401 (prints why the rest can't start)

from omegaconf import OmegaConf
from rich.console import Console

from s2train.command_line.program import run_command
from s2train.environment.apex import apex_available
from s2train.files import describe_output


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run folder, or one of its checkpoints")
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE")
    parser.add_argument("--last", type=int, nargs="+", default=[1, 2], help="numbers of layers, from the end")
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 64, 256], help="keys of an interval")
    parser.add_argument("--draws", type=int, default=1, help="of random numbers, for each cell")
    parser.add_argument("--data", help="a dataset's prefix; default: the held-out part of the run's data")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_intermixed_args()
    run_command(lambda: replace(given))


def replace(given: argparse.Namespace) -> None:
    """Measure, and print the table."""
    apex_available()  # rejects another package named apex, which Megatron would import
    from s2train.probes.approximation.evaluate_checkpoint import Source, replace_layers  # imports Megatron: slow
    from s2train.probes.approximation.replacement import Grid

    settings = OmegaConf.to_container(OmegaConf.from_dotlist(given.settings))
    source = Source(given.checkpoint, given.data, given.length, given.sequences)
    grid = Grid(tuple(given.last), tuple(given.samples), given.draws)
    Console(width=120).print(replace_layers(source, grid, settings, given.output))
    print(describe_output(given.output))


if __name__ == "__main__":
    main()
