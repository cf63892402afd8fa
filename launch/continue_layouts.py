"""Continue a dense checkpoint's training under each layout of a frontier.

Dense attention continues too, as the control.

python launch/continue_layouts.py runs/semsa/frontier.json runs/semsa/continued --densities 0.15 0.25 --steps 200

Each layout is a run of launch/pretrain.py with the dense run's settings, in OUTPUT/runs. Its losses are added to
OUTPUT/continued.json when it ends. Run the same command again to resume it where it stopped, as it does when --minutes
are over; run it several times at once, with another --gpu each, to share the runs. Further settings, such as
evaluation.batches=32, go to launch/pretrain.py.
"""

import argparse
import sys
from pathlib import Path

import _surroundings  # noqa: F401 (prints why the rest can't start)

from _deadline import Deadline, minutes

from s2train.command_line.program import run_command, settings_before_options
from s2train.semsa.frontier_points import TRAINED

PRETRAIN = str(Path(__file__).parent / "pretrain.py")


def main(words: list[str] | None = None) -> None:
    """The command line's entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frontier", type=Path, help=".json file of launch/layout_frontier.py, measured with layouts=…")
    parser.add_argument("output", type=Path, help="folder of runs and results")
    parser.add_argument("settings", nargs="*", metavar="setting=value", help="further settings of launch/pretrain.py")
    parser.add_argument("--densities", type=float, nargs="+", help="some of the frontier's; default: all")
    parser.add_argument(
        "--layouts", nargs="+", default=list(TRAINED), help=f"of the frontier's; default: {' '.join(TRAINED)}"
    )
    parser.add_argument("--draws", type=int, default=1, help="random layouts at each density; default: 1")
    parser.add_argument("--steps", type=int, default=200, help="further steps of each run; default: 200")
    parser.add_argument("--gpu", help="device of the runs; default: as CUDA_VISIBLE_DEVICES says")
    parser.add_argument("--minutes", type=minutes, default=9, help="stop then, with a checkpoint saved; default: 9")
    given = parser.parse_args(settings_before_options(sys.argv[1:] if words is None else words))
    run_command(lambda: continue_layouts(given))


def continue_layouts(given: argparse.Namespace) -> None:
    """Run what is due.

    Raises:
        ConfigError: something is missing, or a file doesn't fit.
    """
    from s2train.comparison.continued_layouts import (  # imports Megatron: slow
        arguments,
        begin,
        claimed,
        continuations,
        is_recorded,
        is_trained,
        read_study,
        record,
    )

    study = read_study(given.frontier, given.output, given.steps, given.settings)
    runs = continuations(study, given.densities, given.layouts, given.draws)
    begin(study)
    deadline = Deadline(given.minutes, {} if given.gpu is None else {"CUDA_VISIBLE_DEVICES": given.gpu})
    for run in runs:
        with claimed(study, run) as is_due:
            if not is_due:
                continue
            if not is_trained(study, run):
                deadline.run([PRETRAIN, *arguments(study, run)], study.folder / "programs.jsonl")
            row = record(study, run)
            print(f"{run.name}: held-out loss {row['held_out_loss']:.4f} after {study.steps} steps, first training "
                  f"loss {row['first_loss']:.4f}", flush=True)  # fmt: skip
    if others := [run.name for run in runs if not is_recorded(study, run)]:
        print(f"other processes run {', '.join(others)}")
    else:
        print(f"results {study.results}")


if __name__ == "__main__":
    main()
