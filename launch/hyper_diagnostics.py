"""Measure whether HyperAttention's assumptions hold for a trained model, and its error.

python launch/hyper_diagnostics.py runs/tiny_dense bucket=32 shortest=64 window=16 sinks=16 --output OUT

Writes OUT.json and OUT.png: the largest squared column norm of every layer's attention matrices, α/n, by length; and
the error of every layer's attention, and of Gaussian and clustered inputs, by number of samples.
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
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024], help="n of the column norms")
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--draws", type=int, default=2, help="of random numbers, for each error")
    parser.add_argument("--data", help="a dataset's prefix; default: the held-out part of the run's data")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_intermixed_args()
    run_command(lambda: diagnose(given))


def diagnose(given: argparse.Namespace) -> None:
    """Measure, and print the table of column norms."""
    apex_available()  # rejects another package named apex, which Megatron would import
    from s2train.probes.approximation import evaluate_checkpoint as evaluation  # imports Megatron: slow

    settings = OmegaConf.to_container(OmegaConf.from_dotlist(given.settings))
    source = evaluation.Source(given.checkpoint, given.data, given.length, given.sequences)
    table = evaluation.diagnose(source, given.lengths, given.samples, given.draws, settings, given.output)
    Console(width=120).print(table)
    print(describe_output(given.output))


if __name__ == "__main__":
    main()
