"""Measure training on several GPUs of this host.

python launch/scaling.py OUTPUT --gpus 2

Writes results of these parts to OUTPUT.json as they come:
--parity    compare all parallel divisions of a model over the GPUs with one process: losses agree within rounding
--resume    compare stopped and resumed deterministic runs with uninterrupted ones: bit-identical, also if half of four
            or more GPUs trained in between
--scaling   measure tokens/s, MFU, communication time and memory on 1, 2, 4, … GPUs
--cp-bytes  measure bytes and time of context parallel exchange, compared with gathering all keys
--balance   measure how evenly attention is spread over tensor and context parallel ranks, with and without balancing
--long      measure steps of very long sequences, context parallel over all GPUs: time, MFU, memory against plan; and
            compare their losses with two GPUs

Without these options, all parts run but the last. Settings, such as schedule.placement=balanced, apply to every
training run; those that a part sets itself, such as parallel.tp, are rejected. Runs and logs are kept in
runs/scaling-NAME, and results of finished runs in OUTPUT.jobs.json: after an interruption the same command resumes from
there, and repeats failed runs; on another machine too, where both files are. It may name other parts, with the same
options otherwise. Ends with status 1 if a run failed, or if --parity, --resume or --long found a difference.
Without a GPU it uses CPU processes, to try the program: see the options in tests/scaling/test_program.py.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import _surroundings  # noqa: F401 (prints why the rest can't start)

from s2train.command_line.messages import warn
from s2train.command_line.program import option_name, run_command, settings_before_options, tokens
from s2train.environment.provenance import environment
from s2train.errors import ConfigError, TrainingError
from s2train.files import check_writable, write_json
from s2train.scaling import speed
from s2train.scaling.earlier import Kept, measured_with
from s2train.scaling.jobs import Runner, rank_environment
from s2train.scaling.launchers import Launcher, by_fork, by_torchrun, forks_problem
from s2train.scaling.long_steps import Request, long_steps
from s2train.scaling.options import PARTS, check_options, chosen_parts, devices, without_effect
from s2train.scaling.parity import parity
from s2train.scaling.recorded import Recorded
from s2train.scaling.report import disagrees, is_done, lines
from s2train.scaling.resumption import resumption

# Plans a part's runs. They start when the first result is asked for: those so far, after each run or at the end.
Part = Callable[[], Iterator[dict[str, Any]]]

# Options that may differ when a command resumes: they say what to run when, and change no result.
WHEN = ("output", *PARTS, "parity_at_once", "timeout", "launcher")


def scaling(given: argparse.Namespace, unread: str | None) -> None:
    """Run the parts, and write the results after each run.

    Args:
        unread: says which options have no effect.

    Raises:
        ConfigError: the output or its runs exist from other options, or an option can't work.
        TrainingError: runs failed, and their errors are in the results; or what was compared does not agree.
    """
    check_options(given)
    hardware = devices(given.gpus)
    if unread is not None:
        warn(unread)
    if hardware.kind != "cuda":
        warn(f"no GPU is visible: the runs take {given.gpus} CPU processes, to try the program")
    kept = Kept.of(given.output)
    asked = {name: value for name, value in vars(given).items() if name not in WHEN}
    content = _continued(kept.earlier(asked), asked)
    check_writable("OUTPUT", kept.results.parent)
    recorded = Recorded(kept.jobs)
    launch = _launcher(given.launcher)
    runner = Runner(kept.runs.absolute(), given.gpus, recorded, launch, given.settings, given.timeout)
    length = ["--length", str(given.attention_length)] if given.attention_length else []
    long_request = Request(
        given.long_size, given.long_lengths, given.long_agreement, given.long_layers, given.long_seconds, given.settings
    )
    divisions = None if given.divisions is None else tuple(given.divisions)
    speed_request = speed.Request(tuple(given.models), given.seq_length, given.sequences, given.micro_batch, divisions)
    parts: dict[str, Part] = {
        "parity": lambda: parity(runner, given.parity_model, length, given.parity_at_once),
        "resume": lambda: resumption(runner, given.parity_model),
        "scaling": lambda: speed.speed(runner, speed_request),
        "cp_bytes": lambda: runner.measure("s2train.scaling.exchange", "cp-bytes", *length),
        "balance": lambda: runner.measure("s2train.scaling.balance", "balance", *length),
        "long": lambda: long_steps(runner, long_request, hardware),
    }
    chosen = chosen_parts(given)
    # All are planned before the first run, since a part may be rejected.
    planned = {name: parts[name]() for name in chosen if not is_done(content["parts"].get(name))}
    kept.begin(asked, content)

    def write(name: str, result: dict[str, Any]) -> None:
        content["parts"][name] = result
        write_json(kept.results, content)

    for name in chosen:
        if name in planned:
            began = time.monotonic()
            result: dict[str, Any] = {}
            for result in planned[name]:
                write(name, result | {"unfinished": True})
            write(name, result | {"seconds": time.monotonic() - began})
        print("\n".join(lines(name, content["parts"][name])), flush=True)
    if failed := [name for name in chosen if not is_done(content["parts"][name])]:
        raise TrainingError(f"runs of {', '.join(failed)} failed; the same command repeats them")
    if different := [name for name in chosen if disagrees(content["parts"][name])]:
        raise TrainingError(f"what {', '.join(different)} compared does not agree; see above and {kept.results}")


def _continued(earlier: Mapping[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """Return the content of OUTPUT.json, with what is kept of it."""
    commands = [*earlier.get("commands", []), shlex.join(sys.argv)]
    return {
        "commands": list(dict.fromkeys(commands)),
        "asked": asked,
        **measured_with(earlier, environment()),
        "devices": asked["gpus"],
        "parts": earlier.get("parts", {}),
    }


def _launcher(name: str) -> Launcher:
    if name == "torchrun":
        return by_torchrun
    if (problem := forks_problem(rank_environment(0, 1))) is not None:
        raise ConfigError("--launcher", name, problem, "Set --launcher torchrun, which imports everything for each run")
    return by_fork


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("settings", nargs="*", help="of every training run, such as loss=liger")
    parser.add_argument("--gpus", type=int, default=2, help="2, 4 or 8; default: 2")
    for part in PARTS:
        parser.add_argument(option_name(part), action="store_true")
    parser.add_argument(
        "--parity-model", default="125m_hybrid", help="of --parity and --resume, of conf/model; default: 125m_hybrid"
    )
    parser.add_argument(
        "--parity-at-once", type=int, default=1, help="concurrent runs on the same GPUs, if memory suffices"
    )
    parser.add_argument(
        "--models", nargs="+", default=["1b_hybrid", "1b_dense"], help="of --scaling; default: 1b_hybrid 1b_dense"
    )
    parser.add_argument(
        "--seq-length", type=tokens, default=32_768, help="tokens per sequence of --scaling; default: 32k"
    )
    parser.add_argument(
        "--sequences", type=int, default=2, help="sequences per step of --scaling; with data parallel, per GPU"
    )
    parser.add_argument(
        "--micro-batch", type=int, default=1, help="sequences of --scaling that go through a GPU at once"
    )
    parser.add_argument(
        "--divisions",
        nargs="+",
        help="those of --scaling, such as one cp4 'tp4 cp2'; 'one' is what the others are compared with; default: all",
    )
    parser.add_argument(
        "--attention-length", type=tokens, help="tokens of attention alone: of --cp-bytes, --balance, and of --parity"
    )
    parser.add_argument("--long-size", default="7b", help="model size of --long: SIZE_hybrid and SIZE_dense")
    parser.add_argument(
        "--long-lengths",
        type=tokens,
        nargs="+",
        default=[131_072, 524_288, 1_048_576],
        help="tokens per sequence of --long; the dense model takes the longest whose step is short enough; default: "
        "128k 512k 1m",
    )
    parser.add_argument("--long-agreement", type=tokens, default=65_536, help="length of --long's compared losses")
    parser.add_argument("--long-layers", type=int, help="number of layers of --long; default: the most that fit")
    parser.add_argument("--long-seconds", type=float, default=60, help="longest predicted step of --long; default: 60")
    parser.add_argument("--timeout", type=float, default=300, help="time limit of one run, in seconds; default: 300")
    parser.add_argument(
        "--launcher", choices=("fork", "torchrun"), default="fork", help="fork: import once for all runs"
    )
    given = parser.parse_intermixed_args(settings_before_options(sys.argv[1:]))
    run_command(lambda: scaling(given, without_effect(given, parser.parse_args([""]))))


if __name__ == "__main__":
    main()
