"""Checks that a job's ranks are compatible, before anything is built.

Compares versions, settings, clocks, disks and GPUs. The reports go through the rendezvous store, a few hundred bytes
per rank, since NCCL hangs or fails obscurely on many of these differences. Settings are compared by hash; only a rank
whose hash differs reads rank 0's settings.
"""

import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import Store

from s2train.attention.teacher import teacher_setting
from s2train.config import PretrainConfig, settings_by_name
from s2train.costs.memory import GIB, checkpoint_bytes
from s2train.data.blend import dataset_prefixes, parse_blend
from s2train.distributed.rendezvous import raise_on_all_ranks, wait_for_all_ranks
from s2train.environment.versions import versions
from s2train.errors import ConfigError
from s2train.planning import Plan, hybrid_layout

MAX_CLOCK_SKEW_S = 10.0  # far more than the time to wake a rank, far less than what disorders logs and file times
_FILE_VISIBLE_S = 15.0  # a network file system may show a new file late


@dataclass(frozen=True)
class RankReport:
    """What a rank reports about itself.

    Attributes:
        settings: settings that differ from rank 0's, as [this rank's, rank 0's].
        clock: seconds since 1970, read when rank 0 asked.
        free_bytes: free space on the run folder's disk.
        device: name of the GPU, or "CPU".
        device_id: unique ID of the GPU; empty on a CPU.
        sees_run_dir: whether rank 0's run folder is visible on this rank.
        missing: data and a teacher that are not visible on this rank, such as "data.path runs/data/mine".
    """

    rank: int
    host: str
    versions: dict[str, str]
    settings: dict[str, list[Any]]
    clock: float
    free_bytes: int
    device: str
    device_id: str
    sees_run_dir: bool
    missing: list[str]

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def check_start(cfg: PretrainConfig, plan: Plan, store: Store, rank: int, world_size: int) -> None:
    """Check that all ranks are compatible, before the process group exists.

    Collective: call it on all ranks. Sets `cfg.run_dir` to rank 0's.

    Args:
        plan: plan of this rank's settings and device.
        store: store that only this job uses.
    Raises:
        StartUpError: on every rank, with every problem.
        MissingRankError: on rank 0; see `s2train.distributed.rendezvous.wait_for_all_ranks`.
    """
    settings = _comparable(cfg)
    wait_for_all_ranks(store, rank, world_size)
    markers: list[Path] = []
    if rank == 0:
        markers = [Path(folder) / f".start-{uuid.uuid4().hex}" for folder in (cfg.run_dir, cfg.data.cache)]
        for path in markers:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        marker, cache_marker = map(str, markers)
        request = {"run_dir": cfg.run_dir, "marker": marker, "cache_marker": cache_marker, "hash": _digest(settings)}
        store.set("settings", json.dumps(settings))
        store.set("request", json.dumps(request))
    request = json.loads(store.get("request"))
    clock = time.time()
    # A run folder named after the time has another name on every rank.
    cfg.run_dir = request["run_dir"]
    report = RankReport(
        rank=rank,
        host=socket.gethostname(),
        versions=versions(),
        settings={}
        if _digest(settings) == request["hash"]
        else _differences(settings, json.loads(store.get("settings"))),
        clock=clock,
        free_bytes=_free_bytes(Path(cfg.run_dir)),
        device=plan.hardware.name,
        device_id=_device_id() if plan.hardware.kind == "cuda" else "",
        sees_run_dir=_becomes_visible(Path(request["marker"])),
        missing=missing_inputs(cfg, request["cache_marker"]),
    )
    store.set(f"reports/{rank}", json.dumps(asdict(report)))
    found: list[str] = []
    if rank == 0:
        texts = store.multi_get([f"reports/{other}" for other in range(world_size)])
        for path in markers:
            path.unlink()
        needed = checkpoint_bytes(cfg, hybrid_layout(cfg)) if cfg.checkpoint.save else 0
        found = list(problems([RankReport(**json.loads(text)) for text in texts], needed))
    raise_on_all_ranks(store, rank, world_size, "problems", found)


def problems(ranks: Sequence[RankReport], checkpoint: int) -> Iterator[str]:
    """Describe what keeps ranks from training together.

    Each line names the rank, the problem and the remedy.

    Args:
        ranks: reports, rank 0's first; the others are compared with it.
        checkpoint: bytes of one checkpoint; 0 if none is saved.
    """
    reported: set[tuple[str, str]] = set()
    for report in ranks:
        for problem in _problems_of(report, ranks[0], checkpoint):
            if (report.host, problem) not in reported:  # once per machine
                reported.add((report.host, problem))
                yield f"{report}: {problem}"
    owners: dict[tuple[str, str], RankReport] = {}
    for report in ranks:
        owner = owners.setdefault((report.host, report.device_id), report)
        if report.device_id and owner is not report:
            yield (
                f"{report}: it uses the same GPU as rank {owner.rank} ({report.device_id}). Start one process per GPU,"
                " all in one torchrun, and don't change CUDA_VISIBLE_DEVICES in any of them"
            )


def _problems_of(report: RankReport, first: RankReport, checkpoint: int) -> Iterator[str]:
    for name in sorted(report.versions.keys() | first.versions.keys()):
        mine, others = report.versions.get(name, "not installed"), first.versions.get(name, "not installed")
        if mine != others:
            yield f"{name} is {mine}, but {others} on {first}. Use the same installation on all machines"
    for name, (mine, others) in report.settings.items():
        yield f"{name}={mine}, but {others} on {first}. Start every node with the same command"
    skew = report.clock - first.clock
    if abs(skew) > MAX_CLOCK_SKEW_S:
        yield (
            f"its clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the clock of {first}."
            " Synchronise the machines' clocks (NTP, chrony)"
        )
    if not report.sees_run_dir:
        yield f"it can't see the run folder of {first}. Set run_dir to a folder on a disk that all machines share"
    for name in report.missing:
        yield f"it can't see {name}. Put it on a disk that all machines share, and set its absolute path"
    if report.free_bytes < checkpoint:
        yield (
            f"the run folder's disk has {report.free_bytes / GIB:.1f} GiB free, but one checkpoint takes"
            f" {checkpoint / GIB:.1f}. Free some space, set run_dir to a folder on another disk, or set"
            " checkpoint.save=false to measure speed only"
        )
    if report.device != first.device:
        seen = "no GPU is visible" if report.device == "CPU" else f"its GPU is a {report.device}"
        yield (
            f"{seen}, but {first} has {first.device}. Use machines with the same GPUs, and check nvidia-smi and"
            " CUDA_VISIBLE_DEVICES on this one"
        )


def _comparable(cfg: PretrainConfig) -> dict[str, Any]:
    """Settings by dotted name, without run_dir.

    All ranks take run_dir from rank 0.
    """
    return {name: value for name, value in settings_by_name(asdict(cfg)) if name != "run_dir"}


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _differences(mine: dict[str, Any], others: dict[str, Any]) -> dict[str, list[Any]]:
    mine = json.loads(json.dumps(mine))  # turns tuples into lists
    return {
        name: [mine.get(name), others.get(name)]
        for name in sorted(mine.keys() | others.keys())
        if mine.get(name) != others.get(name)
    }


def _free_bytes(folder: Path) -> int:
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def _becomes_visible(path: Path) -> bool:
    """Whether a file exists, or becomes visible within `_FILE_VISIBLE_S`."""
    until = time.monotonic() + _FILE_VISIBLE_S
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def missing_inputs(cfg: PretrainConfig, cache_marker: str) -> list[str]:
    """List data and a teacher that this rank can't see.

    Args:
        cache_marker: rank 0's file in `data.cache`.
    """
    try:
        prefixes = parse_blend(cfg.data.path).prefixes
        held_out = () if cfg.data.valid_path is None else dataset_prefixes(cfg.data.valid_path)
    except ConfigError as error:  # the blend needs the size of a dataset that is not visible
        return [f"data.path {error.value}"]
    missing = [f"data.path {prefix}" for prefix in prefixes if not _becomes_visible(Path(f"{prefix}.idx"))]
    missing += [f"data.valid_path {prefix}" for prefix in held_out if not _becomes_visible(Path(f"{prefix}.idx"))]
    teacher = teacher_setting(hybrid_layout(cfg).layers)
    if teacher is not None and not _becomes_visible(Path(teacher.value)):
        missing.append(f"{teacher.setting} {teacher.value}")
    return missing if _becomes_visible(Path(cache_marker)) else [*missing, f"data.cache {cfg.data.cache}"]


def _device_id() -> str:
    return str(torch.cuda.get_device_properties(int(os.environ["LOCAL_RANK"])).uuid)
