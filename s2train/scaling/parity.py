"""Compares losses on several processes with those on one, for every parallelism.

All runs start from one checkpoint; losses must agree within rounding.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from s2train.environment.hardware import detect
from s2train.scaling.jobs import Job, Outcome, Runner
from s2train.validation.overlap import can_overlap

STEPS = 20
_PLAIN = "parallel.distributed_optimizer=false"
_OVERLAP = "parallel.tp_comm_overlap=true"

# By number of processes; the remaining parallelism is data parallel.
VARIANTS: dict[int, dict[str, tuple[str, ...]]] = {
    2: {
        "tp2": ("parallel.tp=2",),
        "tp2 sp": ("parallel.tp=2", "parallel.sequence_parallel=true"),
        "tp2 overlap": ("parallel.tp=2", "parallel.sequence_parallel=true", _OVERLAP),
        "pp2": ("parallel.pp=2",),
        "cp2": ("parallel.cp=2",),
        "cp2 overlapped": ("parallel.cp=2", "parallel.cp_exchange=overlapped"),
        "cp2 gather": ("parallel.cp=2", "parallel.cp_exchange=gather"),
        "dp2": (_PLAIN,),
        "dp2 distributed optimizer": (),
    },
    4: {
        "tp4 sp": ("parallel.tp=4", "parallel.sequence_parallel=true"),
        "tp4 overlap": ("parallel.tp=4", "parallel.sequence_parallel=true", _OVERLAP),
        "pp4": ("parallel.pp=4",),
        "cp4": ("parallel.cp=4",),
        "cp4 gather": ("parallel.cp=4", "parallel.cp_exchange=gather"),
        "dp4": (_PLAIN,),
        "dp4 distributed optimizer": (),
        "tp2 cp2": ("parallel.tp=2", "parallel.sequence_parallel=true", "parallel.cp=2"),
        "pp2 tp2": ("parallel.pp=2", "parallel.tp=2", "parallel.sequence_parallel=true"),
    },
    8: {
        "cp8": ("parallel.cp=8",),
        "dp8 distributed optimizer": (),
        "tp4 cp2": ("parallel.tp=4", "parallel.sequence_parallel=true", "parallel.cp=2"),
        "tp4 dp2": ("parallel.tp=4", "parallel.sequence_parallel=true"),
        "tp4 dp2 overlap": ("parallel.tp=4", "parallel.sequence_parallel=true", _OVERLAP),
        "pp2 tp2 cp2": ("parallel.pp=2", "parallel.tp=2", "parallel.sequence_parallel=true", "parallel.cp=2"),
    },
}


def parity(runner: Runner, model: str, attention_settings: Sequence[str], at_once: int = 1) -> Iterator[dict[str, Any]]:
    """Compare losses of all divisions with those of one process.

    Over `STEPS` steps, for each of `VARIANTS` for the runner's devices; without overlap where PCIe links them. Plans
    all runs at once, and yields the result.

    The tolerance is twice the largest relative difference over the steps between runs of one process that differ only
    in rounding: in the micro batch and, on a GPU, in the kernels of sparse and of dense layers. Context parallel
    attention alone is compared in fp32 too.

    Args:
        attention_settings: arguments of `s2train.scaling.exactness`.
        at_once: number of parallel runs to run concurrently on the same devices, which then hold that many models.

    Raises:
        ConfigError: the command's settings would change what is compared.
    """
    common = (
        f"+model={model}", f"train.steps={STEPS + 1}", "train.global_batch_size=8", "train.micro_batch_size=1",
        "optim.warmup_steps=5", "evaluation.interval=0", "tracking.log_interval=1", "data.num_workers=0",
    )  # fmt: skip
    settings = {"start": common, "start plain": (*common, _PLAIN)}
    starts = [Job(name, 1, (*own, "train.exit_step=1"), saves=(1,)) for name, own in settings.items()]
    variants = VARIANTS[runner.devices]
    if not can_overlap(detect()):
        variants = {name: settings for name, settings in variants.items() if _OVERLAP not in settings}

    def job(name: str, processes: int, *settings: str) -> Job:
        start = "start plain" if _PLAIN in settings else "start"
        resume = (f"checkpoint.resume='{runner.checkpoint(start, 1)}'", "checkpoint.save=false")
        return Job(name, processes, (*common, *settings, *resume), after=start)

    rounding = {f"micro batch {size}": (f"train.micro_batch_size={size}",) for size in (2, 4, 8)}
    if torch.cuda.is_available():
        rounding["portable kernels"] = ("attention_backend=portable",)
        rounding["FlashAttention-2 in dense layers"] = ("dense_attention=flash",)
    jobs = [job("one", 1), *(job(name, 1, *settings) for name, settings in rounding.items())]
    jobs += [job(name, runner.devices, *settings) for name, settings in variants.items()]
    runner.check("parity", [*starts, *jobs])

    def results() -> Iterator[dict[str, Any]]:
        outcomes = runner.run(starts)
        if all(outcome.error is None for outcome in outcomes.values()):
            outcomes |= runner.run(jobs, at_once)
        result = compare_losses(outcomes, list(rounding), list(variants)) | {"model": model, "settings": common}
        attention = runner.worker("s2train.scaling.exactness", "cp attention", *attention_settings)
        yield result | {
            "cp_attention_fp32": attention,
            "agrees": result["agrees"] and attention.get("agrees", False),
        }

    return results()


def compare_losses(outcomes: dict[str, Outcome], rounding: list[str], variants: list[str]) -> dict[str, Any]:
    """Compute the tolerance and each variant's deviation, relative, largest over the steps.

    `agrees` if every variant ran and is within the tolerance.

    Args:
        rounding: names of runs on one process that differ only in rounding.
    """
    errors = {name: outcome.error for name, outcome in outcomes.items() if outcome.error is not None}
    errors |= {name: "a loss is not finite" for name, outcome in outcomes.items() if None in outcome.losses}
    result: dict[str, Any] = {"agrees": False, "errors": errors}
    if any(name not in outcomes or name in errors for name in ("one", *rounding)):
        return result
    one = outcomes["one"].losses
    differences = {name: deviation(outcomes[name].losses, one) for name in rounding}
    found = {name: deviation(outcomes[name].losses, one) for name in variants if name not in errors}
    tolerance = 2 * max(differences.values())
    return result | {
        "rounding": differences,
        "tolerance": tolerance,
        "deviation": found,
        "agrees": not errors and all(value <= tolerance for value in found.values()),
        "losses": {name: outcome.losses for name, outcome in outcomes.items()},
    }


def deviation(found: Sequence[float | None], expected: Sequence[float | None]) -> float:
    """Largest relative difference of two traces of equal length, all finite."""
    differences = []
    for x, y in zip(found, expected, strict=True):
        assert x is not None
        assert y is not None
        differences.append(abs(x - y) / abs(y))
    return max(differences)
