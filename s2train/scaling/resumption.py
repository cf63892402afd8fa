"""Checks that a resumed run equals an uninterrupted one bit for bit.

Also if it used fewer devices in between.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from s2train.checkpoints.integrity import COMMON
from s2train.command_line.commands import hydra_setting
from s2train.scaling.jobs import Job, Outcome, Runner

STEPS, STOP = 20, 10
_STOPS = STEPS // 3, 2 * STEPS // 3  # before and after fewer devices
_MOST_STAGES = 4  # which divide the layers of a small model; beyond them, devices are data parallel
_REPORTED = ("loss", "held_out_loss", "grad_norm", "lr")


@dataclass(frozen=True)
class _Comparison:
    """A resumed run, and the uninterrupted one that it must equal.

    Attributes:
        begin: the uninterrupted run, and the one that stops first.
        later: runs that resume, each the one before.
        reported: values of the reports that are compared.
        stop: step of the last stop.
    """

    begin: tuple[Job, Job]
    later: tuple[Job, ...]
    reported: tuple[str, ...]
    stop: int

    def result(self, runner: Runner) -> dict[str, Any]:
        """Run all, and compare reports after the last stop, and last checkpoints."""
        outcomes = runner.run(self.begin, at_once=2)
        before = self.begin[1].name
        for job in self.later:
            if outcomes[before].error is not None:
                break
            outcomes |= runner.run([job])
            before = job.name
        names = (self.begin[0].name, self.later[-1].name)
        result = compare_reports(outcomes[names[0]], outcomes.get(names[1]), self.reported, self.stop)
        errors = {name: outcome.error for name, outcome in outcomes.items() if outcome.error is not None}
        if not errors:
            last = [runner.checkpoint(name, STEPS) for name in names]
            tensors, different = find_differences(*map(read_values, last))
            result |= {"saved_values": tensors, "different_values": different}
            result["agrees"] = result["agrees"] and not different
        return result | {"errors": errors}


def resumption(runner: Runner, model: str) -> Iterator[dict[str, Any]]:
    """Compare a resumed run with an uninterrupted one.

    The resumed run was stopped after `STOP` steps. Both take `STEPS` deterministic steps, data parallel on all of the
    runner's devices. `agrees` if nothing differs in the reports after the stop and in the last checkpoint: weights,
    optimizer, learning-rate schedule, random number generators. With four devices or more, `fewer` adds the results of
    a run that used half of them in between. Plans all runs at once, and yields the results after each comparison.

    Raises:
        ConfigError: the command's settings would change what is compared.
    """
    common = (
        f"+model={model}", "train.deterministic=true", f"train.steps={STEPS}", "train.global_batch_size=8",
        "train.micro_batch_size=1", "optim.warmup_steps=5", f"evaluation.interval={STEPS}", "evaluation.batches=1",
        "tracking.log_interval=1",
    )  # fmt: skip
    size = runner.devices
    on_all = _on_all(runner, common)
    fewer = None if size < 4 else _on_fewer(runner, common)
    runner.check("resume", [job for found in (on_all, fewer) if found for job in (*found.begin, *found.later)])

    def results() -> Iterator[dict[str, Any]]:
        result = on_all.result(runner) | {"model": model, "settings": common, "processes": size}
        yield result
        if fewer is not None:
            shape = {"processes": [size, size // 2, size], "steps": [*_STOPS, STEPS]}
            yield result | {"fewer": fewer.result(runner) | shape}

    return results()


def _on_all(runner: Runner, common: tuple[str, ...]) -> _Comparison:
    """Plan a run that stops once, and resumes on all devices."""
    size = runner.devices
    stopped = Job("stopped", size, (*common, f"train.exit_step={STOP}"), saves=(STOP,))
    resumed = _resumed(runner, "resumed", size, common, stopped.name, STOP, STEPS)
    return _Comparison((Job("uninterrupted", size, common, saves=(STEPS,)), stopped), (resumed,), _REPORTED, STOP)


def _on_fewer(runner: Runner, common: tuple[str, ...]) -> _Comparison:
    """Plan a run on all devices, then half, then all.

    Half of the devices are half of the pipeline stages, whose number changes no sum: each weight's gradient
    sums the same micro batches in the same order. Only the norm of all gradients sums by stage, so it is not compared,
    and clips nothing. The residual sums are not fused with norms: within a stage, a fused norm reads a sum that is not
    rounded yet, but the first norm of a stage reads a rounded one.
    """
    size = runner.devices
    whole, half = (
        (
            *common,
            f"parallel.pp={min(size, _MOST_STAGES) * count // size}",
            "optim.clip_grad=0",
            "elementwise=torch",
        )
        for count in (size, size // 2)
    )
    first, second = _STOPS
    begin = (
        Job("stages", size, whole, saves=(STEPS,)),
        Job("stages stopped", size, (*whole, f"train.exit_step={first}"), saves=(first,)),
    )
    later = (
        _resumed(runner, "stages on half", size // 2, half, "stages stopped", first, second),
        _resumed(runner, "stages resumed", size, whole, "stages on half", second, STEPS),
    )
    return _Comparison(begin, later, ("loss", "held_out_loss", "lr"), second)


def _resumed(runner: Runner, name: str, size: int, settings: tuple[str, ...], before: str, start: int, end: int) -> Job:
    """Make the job that trains from step `start` to `end`.

    It resumes from the job `before`, and saves at the end.
    """
    own = (hydra_setting("checkpoint.resume", runner.checkpoint(before, start)), f"train.exit_step={end}")
    return Job(name, size, (*settings, *own), saves=(end,), after=before)


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
