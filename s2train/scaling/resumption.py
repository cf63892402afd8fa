"""Checks that a resumed run equals an uninterrupted one bit for bit.

Also if it used fewer devices in between.
"""

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
_MOST_STAGES = 4  # which divide the layers of a small model; beyond them, devices are data parallel
_REPORTED = ("loss", "held_out_loss", "grad_norm", "lr")


def resumption(runner: Runner, model: str) -> dict[str, Any]:
    """Compare a resumed run with an uninterrupted one.

    The resumed run was stopped after `STOP` steps. Both take `STEPS` deterministic steps, data parallel on all of the
    runner's devices. `agrees` if nothing differs in the reports after the stop and in the last checkpoint: weights,
    optimizer, learning-rate schedule, random number generators. With four devices or more, `fewer` adds the results of
    `resumption_on_fewer`.
    """
    common = (
        f"+model={model}", "train.deterministic=true", f"train.steps={STEPS}", "train.global_batch_size=8",
        "train.micro_batch_size=1", "optim.warmup_steps=5", f"evaluation.interval={STEPS}", "evaluation.batches=1",
        "tracking.log_interval=1",
    )  # fmt: skip
    names = ("uninterrupted", "stopped", "resumed")
    stopped = (*common, f"train.exit_step={STOP}")
    size = runner.devices
    outcomes = runner.run(
        [Job(names[0], size, common, saves=(STEPS,)), Job(names[1], size, stopped, saves=(STOP,))], at_once=2
    )
    if outcomes[names[1]].error is None:
        outcomes |= runner.run([_resumed(runner, names[2], size, common, names[1], STOP, STEPS)])
    result = _compare(runner, outcomes, names[0], names[2]) | {"model": model, "settings": common, "processes": size}
    return result if size < 4 else result | {"fewer": resumption_on_fewer(runner, common)}


def resumption_on_fewer(runner: Runner, common: tuple[str, ...]) -> dict[str, Any]:
    """Compare a resumed run with an uninterrupted one on all devices.

    It runs on all devices, then half, then all.

    Half of the devices are half of the pipeline stages, whose number changes no sum: each weight's gradient
    sums the same micro batches in the same order. Only the norm of all gradients sums by stage, so it is not compared,
    and clips nothing. The residual sums are not fused with norms: within a stage, a fused norm reads a sum that is not
    rounded yet, but the first norm of a stage reads a rounded one.
    """
    names = ("stages", "stages stopped", "stages on half", "stages resumed")
    size = runner.devices
    of_size = {
        count: (
            *common,
            f"parallel.pp={min(size, _MOST_STAGES) * count // size}",
            "optim.clip_grad=0",
            "elementwise=torch",
        )
        for count in (size, size // 2)
    }
    first, second = STEPS // 3, 2 * STEPS // 3
    outcomes = runner.run(
        [
            Job(names[0], size, of_size[size], saves=(STEPS,)),
            Job(names[1], size, (*of_size[size], f"train.exit_step={first}"), saves=(first,)),
        ],
        at_once=2,
    )
    later = (
        (names[2], size // 2, names[1], first, second),
        (names[3], size, names[2], second, STEPS),
    )
    for name, count, before, start, end in later:
        if outcomes[before].error is not None:
            break
        outcomes |= runner.run([_resumed(runner, name, count, of_size[count], before, start, end)])
    result = _compare(runner, outcomes, names[0], names[3], ("loss", "held_out_loss", "lr"), second)
    return result | {"processes": [size, size // 2, size], "steps": [first, second, STEPS]}


def _resumed(runner: Runner, name: str, size: int, settings: tuple[str, ...], before: str, start: int, end: int) -> Job:
    """Make the job that trains from step `start` to `end`.

    It resumes from the job `before`, and saves at the end.
    """
    own = (f"checkpoint.resume='{runner.checkpoint(before, start)}'", f"train.exit_step={end}")
    return Job(name, size, (*settings, *own), saves=(end,), after=before)


def _compare(
    runner: Runner,
    outcomes: Mapping[str, Outcome],
    uninterrupted: str,
    resumed: str,
    reported: Sequence[str] = _REPORTED,
    stop: int = STOP,
) -> dict[str, Any]:
    """Compare reports after the last stop, and last checkpoints."""
    result = compare_reports(outcomes[uninterrupted], outcomes.get(resumed), reported, stop)
    errors = {name: outcome.error for name, outcome in outcomes.items() if outcome.error is not None}
    if not errors:
        last = [runner.checkpoint(name, STEPS) for name in (uninterrupted, resumed)]
        tensors, different = find_differences(*map(read_values, last))
        result |= {"saved_values": tensors, "different_values": different}
        result["agrees"] = result["agrees"] and not different
    return result | {"errors": errors}


def compare_reports(
    uninterrupted: Outcome, resumed: Outcome | None, reported: Sequence[str] = _REPORTED, stop: int = STOP
) -> dict[str, Any]:
    """Find the steps after `stop` whose reports differ in the values `reported`."""
    if resumed is None or uninterrupted.error is not None or resumed.error is not None:
        return {"agrees": False}
    expected, found = (_reports(outcome.records, reported) for outcome in (uninterrupted, resumed))
    steps = range(stop + 1, STEPS + 1)
    different = [step for step in steps if found.get(step) != expected[step]]
    return {"agrees": not different, "different_steps": different, "losses": [expected[step][0] for step in steps]}


def _reports(records: Sequence[Mapping[str, Any]], reported: Sequence[str]) -> dict[int, list[Any]]:
    return {record["step"]: [record.get(name) for name in reported] for record in records if "loss" in record}


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
