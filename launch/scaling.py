"""Measure training on several GPUs of this host.

python launch/scaling.py OUTPUT --gpus 2

Writes OUTPUT.json after each part:
--parity    compare all parallel divisions of a model over two processes with one process: losses agree within rounding
--resume    compare a stopped and resumed deterministic run with an uninterrupted one: bit-identical
--scaling   measure tokens/s, MFU, communication time and memory on 1, 2, 4, … GPUs
--cp-bytes  measure bytes and time of context parallel exchange, compared with gathering all keys
--balance   measure how evenly attention is spread over tensor and context parallel ranks, with and without balancing

Without these options, all parts run. Settings, such as schedule.placement=balanced, apply to every training run. Runs
and logs are kept in runs/scaling-NAME. After an interruption the same command resumes and repeats failed parts. Without
a GPU it uses CPU processes, to try the program: see the options in tests/scaling/test_program.py.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _surroundings  # noqa: F401 (prints why the rest can't start)

from s2train.command_line.program import run_command, settings_before_options
from s2train.comparison.runs import environment
from s2train.errors import ConfigError
from s2train.files import check_writable, output_stem, replacing
from s2train.scaling.jobs import Runner
from s2train.scaling.parity import parity
from s2train.scaling.report import lines
from s2train.scaling.resumption import resumption
from s2train.scaling.speed import speed

Part = Callable[[], dict[str, Any]]


def scaling(given: argparse.Namespace) -> None:
    """Run the parts, and write the results after each.

    Raises:
        ConfigError: the output or its runs exist from another command, or devices are missing.
    """
    output = output_stem(given.output, "OUTPUT")
    path, runs = output.with_name(output.name + ".json"), Path("runs") / f"scaling-{output.name}"
    command, asked = shlex.join(sys.argv), runs / "command.txt"
    if not (asked.is_file() and asked.read_text() == command):
        for there in (path, runs):
            if there.exists():
                raise ConfigError("OUTPUT", given.output, f"{there} exists", "Name another, or move it away")
    check_writable("OUTPUT", path.parent)
    runs.mkdir(parents=True, exist_ok=True)
    asked.write_text(command)
    runner = Runner(runs.absolute(), given.gpus, given.settings, given.timeout)
    length = ["--length", str(given.attention_length)] if given.attention_length else []
    parts: dict[str, Part] = {
        "parity": lambda: parity(runner, given.parity_model, length, given.parity_at_once),
        "resume": lambda: resumption(runner, given.parity_model),
        "scaling": lambda: speed(runner, tuple(given.models), given.seq_length, given.sequences),
        "cp_bytes": lambda: runner.worker("s2train.scaling.exchange", "cp-bytes", *length),
        "balance": lambda: runner.worker("s2train.scaling.balance", "balance", *length),
    }
    chosen = [name for name in parts if getattr(given, name)] or list(parts)
    content: dict[str, Any] = {"command": command, **environment(), "devices": given.gpus, "parts": {}}
    if path.exists():
        content["parts"] = json.loads(path.read_text())["parts"]
    for name in (name for name in chosen if has_failed(content["parts"].get(name, {"error": "not run"}))):
        began = time.monotonic()
        result = parts[name]()
        content["parts"][name] = result | {"seconds": time.monotonic() - began}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
        print("\n".join(lines(name, result)), flush=True)


def has_failed(result: Any) -> bool:
    """Whether a part or a program in it recorded an error."""
    if not isinstance(result, dict):
        return False
    errors = [result.get("error"), *result.get("errors", {}).values()]
    return any(isinstance(error, str) for error in errors) or any(map(has_failed, result.values()))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--gpus", type=int, default=2)
    for part in ("parity", "resume", "scaling", "cp-bytes", "balance"):
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--parity-model", default="125m_hybrid")
    parser.add_argument(
        "--parity-at-once", type=int, default=1, help="concurrent runs on the same GPUs, if memory suffices"
    )
    parser.add_argument("--models", nargs="+", default=["1b_hybrid", "1b_dense"])
    parser.add_argument("--seq-length", type=int, default=32_768, help="tokens per sequence of --scaling")
    parser.add_argument(
        "--sequences", type=int, default=2, help="sequences per step of --scaling; with data parallel, per GPU"
    )
    parser.add_argument("--attention-length", type=int, help="tokens of attention-only measurements")
    parser.add_argument("--timeout", type=float, default=300, help="time limit of one program, in seconds")
    given = parser.parse_intermixed_args(settings_before_options(sys.argv[1:]))
    run_command(lambda: scaling(given))


if __name__ == "__main__":
    main()
