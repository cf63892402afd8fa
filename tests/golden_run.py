"""Records tiny training runs to the last bit: `python tests/golden_run.py OUTPUT.json [--compare BEFORE.json]`.

A change that only moves or renames code must leave every value as it was. Record before the change, compare after it:

    python tests/golden_run.py before.json
    python tests/golden_run.py after.json --compare before.json       # status 1, and a line for each difference

The values are the losses and gradient norms of every step as hexadecimal floats, and a SHA-256 of each tensor of the
checkpoint at the end. They hold for one machine and its versions of torch and Megatron-core. The program uses launch/
and the files that it writes, and no module of s2train, so that it survives a renaming.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).parents[1]
STEPS = 6
SETTINGS = (
    "seed=1234",
    f"train.steps={STEPS}",
    "train.seq_length=192",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.deterministic=true",
    "optim.warmup_steps=2",
    "evaluation.interval=3",
    "evaluation.batches=1",
    "tracking.log_interval=1",
    "tracking.wandb=disabled",
    "data.path=bundled",
    "data.num_workers=0",
)
# Each run is its commands, one after the other: processes, and settings beyond those above.
RUNS: dict[str, tuple[tuple[int, tuple[str, ...]], ...]] = {
    "dense": ((1, ("+model=tiny_dense",)),),
    "hybrid": ((1, ("+model=tiny_hybrid",)),),
    "hybrid, resumed": ((1, ("+model=tiny_hybrid", "train.exit_step=3")), (1, ("+model=tiny_hybrid",))),
    "hybrid, tp 2": ((2, ("+model=tiny_hybrid", "parallel.tp=2")),),
}


def record_run(folder: Path, commands: tuple[tuple[int, tuple[str, ...]], ...]) -> dict[str, Any]:
    """Train in `folder` and return the values of the run.

    Raises:
        SystemExit: a program failed, or left out a step.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    written = []
    for processes, settings in commands:
        launcher = [str(ROOT / "launch/job.py"), "--nproc-per-node", str(processes), str(ROOT / "launch/pretrain.py")]
        arguments = [*settings, *SETTINGS]
        done = subprocess.run(
            [sys.executable, *launcher, *arguments, f"run_dir={folder / 'run'}"],
            cwd=folder,  # which the prepared corpus and Megatron's indices go to
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        written.append(" ".join([f"{processes} x launch/pretrain.py", *arguments]))
        if done.returncode:
            sys.exit(f"error: {written[-1]} ended with status {done.returncode}:\n{done.stderr[-4000:]}")
    steps = read_steps(folder / "run/metrics.jsonl")
    if sorted(steps, key=int) != [str(step) for step in range(1, STEPS + 1)]:
        sys.exit(f"error: {written[-1]} reported steps {', '.join(steps)}, not 1 to {STEPS}")
    return {"commands": written, "steps": steps, "tensors": hash_tensors(folder / "run/checkpoints", folder)}


def read_steps(metrics: Path) -> dict[str, dict[str, str]]:
    """Losses and gradient norms by step, as hexadecimal floats."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    names = ("loss", "grad_norm", "held_out_loss")
    return {
        str(record["step"]): {name: float(record[name]).hex() for name in names if name in record}
        for record in records
        if "loss" in record
    }


def hash_tensors(checkpoints: Path, scratch: Path) -> dict[str, str]:
    """Type, shape and SHA-256 of each tensor of the last checkpoint, by its name in the file."""
    whole = scratch / "whole.pt"
    dcp_to_torch_save(str(max(checkpoints.glob("iter_*"))), str(whole))
    hashes = {}
    for name, tensor in tensors_in(torch.load(whole, weights_only=False)):
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        hashes[name] = f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()}"
    return dict(sorted(hashes.items()))


def tensors_in(value: object, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested dicts and lists, each with its dotted name."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors_in(part, f"{name}.{key}" if name else str(key))


def differences(before: Any, after: Any, name: str = "") -> Iterator[str]:
    """One line for each value that is not the same, or is on one side only."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            yield from differences(before.get(key, "(missing)"), after.get(key, "(missing)"), f"{name} / {key}")
    elif before != after:
        both = (json.dumps(value)[:120] for value in (before, after))
        yield "{}: {} before, {} after".format(name.removeprefix(" / "), *both)


def main() -> None:
    """Record all runs, and compare them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--compare", type=Path, metavar="BEFORE.json")
    given = parser.parse_args()
    before = json.loads(given.compare.read_text(encoding="utf-8")) if given.compare else None
    runs = {}
    for name, commands in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            runs[name] = record_run(Path(folder), commands)
        print(f"{name}: loss {float.fromhex(runs[name]['steps'][str(STEPS)]['loss']):.6f} at step {STEPS}", flush=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    where = {"python": platform.python_version(), "processor": platform.processor() or platform.machine()}
    where |= {name: version(name) for name in ("torch", "megatron-core", "numpy")}
    given.output.write_text(
        json.dumps({"commit": commit.stdout.strip(), "where": where, "runs": runs}, indent=1) + "\n", encoding="utf-8"
    )
    if before is None:
        return
    found = list(differences(before["runs"], json.loads(json.dumps(runs))))
    if before["where"] != where:
        print(f"recorded elsewhere, which alone may change bits: {before['where']}, now {where}")
    values = sum(len(run["tensors"]) + sum(map(len, run["steps"].values())) for run in runs.values())
    print("\n".join(found) or f"all {values} values are those of {before['commit']}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
