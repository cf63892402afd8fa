"""Checks that a resumed run equals an uninterrupted one bit for bit."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from s2train.checkpoints.integrity import COMMON
from s2train.scaling.jobs import Job, Outcome, Runner

STEPS, STOP = 20, 10
_REPORTED = ("loss", "held_out_loss", "grad_norm", "lr")


def resumption(runner: Runner, model: str) -> dict[str, Any]:
    """Compare a resumed run with an uninterrupted one.

    The resumed run was stopped after `STOP` steps. Both take `STEPS` deterministic steps, data parallel on all of the
    runner's devices. `agrees` if nothing differs in the reports after the stop and in the last checkpoint: weights,
    optimizer, learning-rate schedule, random number generators.
    """
    common = (
        f"+model={model}", "train.deterministic=true", f"train.steps={STEPS}", "train.global_batch_size=8",
        "train.micro_batch_size=1", "optim.warmup_steps=5", f"evaluation.interval={STEPS}", "evaluation.batches=1",
        "tracking.log_interval=1",
    )  # fmt: skip
    names = ("uninterrupted", "stopped", "resumed")
    stopped = (*common, f"train.exit_step={STOP}")
    size = runner.devices
    outcomes = runner.run([Job(names[0], size, common), Job(names[1], size, stopped)], at_once=2)
    if outcomes[names[1]].error is None:
        resume = f"checkpoint.resume='{runner.checkpoint(names[1], STOP)}'"
        outcomes |= runner.run([Job(names[2], size, (*common, resume))])
    result = compare_reports(outcomes[names[0]], outcomes.get(names[2]))
    errors = {name: outcome.error for name, outcome in outcomes.items() if outcome.error is not None}
    if not errors:
        last = [runner.checkpoint(name, STEPS) for name in (names[0], names[2])]
        tensors, different = find_differences(*map(read_values, last))
        result |= {"saved_values": tensors, "different_values": different}
        result["agrees"] = result["agrees"] and not different
    return result | {"errors": errors, "model": model, "settings": common, "processes": size}


def compare_reports(uninterrupted: Outcome, resumed: Outcome | None) -> dict[str, Any]:
    """Find the steps after the stop whose reports differ, except in times."""
    if resumed is None or uninterrupted.error is not None or resumed.error is not None:
        return {"agrees": False}
    expected, found = (_reports(outcome.records) for outcome in (uninterrupted, resumed))
    steps = range(STOP + 1, STEPS + 1)
    different = [step for step in steps if found.get(step) != expected[step]]
    return {"agrees": not different, "different_steps": different, "losses": [expected[step][0] for step in steps]}


def _reports(records: Sequence[Mapping[str, Any]]) -> dict[int, list[Any]]:
    return {record["step"]: [record.get(name) for name in _REPORTED] for record in records if "loss" in record}


def read_values(checkpoint: Path) -> dict[str, Any]:
    """Read all values in a checkpoint's shards by name.

    Tensors, and bytes of other objects.
    """
    with TemporaryDirectory(dir=checkpoint.parent) as folder:
        file = Path(folder) / "values.pt"
        dcp_to_torch_save(checkpoint, file)
        values: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=False)
    if (common := checkpoint / COMMON).is_file():
        values[COMMON] = torch.load(common, map_location="cpu", weights_only=False)
    return values


def find_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Count values, and name those that differ in any bit."""
    names = first.keys() | second.keys()
    return len(names), sorted(name for name in names if _bits(first.get(name)) != _bits(second.get(name)))


def _bits(value: Any) -> Any:
    """Convert a value to one that is equal only for identical bits."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, BytesIO):
        return _bits(torch.load(value, map_location="cpu", weights_only=False))
    if isinstance(value, Mapping):
        return {name: _bits(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_bits(inner) for inner in value]
    return value if isinstance(value, int | float | str | bytes | None) else repr(value)
