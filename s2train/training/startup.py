"""Whether the ranks of a job go together, before anything is built: versions, settings, clocks, disks and GPUs.

The facts go through the store that the ranks met at, a few hundred bytes a rank, since NCCL hangs or fails obscurely
on much of what is looked for. Settings are compared by their hash; only a rank whose hash differs reads rank 0's.
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

from s2train.config import PretrainConfig, settings_by_name
from s2train.costs.memory import GIB, checkpoint_bytes
from s2train.data.blend import parse_blend
from s2train.distributed.rendezvous import arrive, exit_on_any_problem
from s2train.environment.versions import versions
from s2train.errors import ConfigError
from s2train.planning import Plan

MAX_CLOCK_SKEW_S = 10.0  # far more than it takes to wake a rank, far less than what mixes up logs and file times
_FOLDER_SEEN_S = 15.0  # a network file system may show a new file late


@dataclass(frozen=True)
class Facts:
    """What a rank tells of itself.

    Attributes:
        settings: those that differ from rank 0's: [this rank's, rank 0's].
        clock: seconds since 1970, read when rank 0 asked.
        free_bytes: on the run folder's disk.
        device: name of the GPU, or "CPU".
        device_id: of the very GPU; empty on a CPU.
        sees_run_dir: whether rank 0's run folder is here too.
        missing: data that are not, such as "data.path runs/data/mine".
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
    """Compare all ranks, on all ranks together, before there is a process group. Sets `cfg.run_dir` to rank 0's.

    Args:
        plan: of this rank's own settings and device.
        store: of this job alone.
    Raises:
        StartUpError: on every rank, with every problem.
        MissingRankError: on rank 0; see `s2train.distributed.rendezvous.arrive`.
    """
    settings = _comparable(cfg)
    arrive(store, rank, world_size)
    markers: list[Path] = []
    if rank == 0:
        markers = [Path(folder) / f".start-{uuid.uuid4().hex}" for folder in (cfg.run_dir, cfg.data.cache)]
        for marker in markers:
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
        seen, cached = map(str, markers)
        go = {"run_dir": cfg.run_dir, "marker": seen, "cache_marker": cached, "hash": _digest(settings)}
        store.set("settings", json.dumps(settings))
        store.set("go", json.dumps(go))
    asked = json.loads(store.get("go"))
    clock = time.time()
    # A name made of the time is another one on every rank.
    cfg.run_dir = asked["run_dir"]
    facts = Facts(
        rank=rank,
        host=socket.gethostname(),
        versions=versions(),
        settings={}
        if _digest(settings) == asked["hash"]
        else _differences(settings, json.loads(store.get("settings"))),
        clock=clock,
        free_bytes=_free_bytes(Path(cfg.run_dir)),
        device=plan.hardware.name,
        device_id=_device_id() if plan.hardware.kind == "cuda" else "",
        sees_run_dir=_appears(Path(asked["marker"])),
        missing=_missing(cfg, asked["cache_marker"]),
    )
    store.set(f"facts/{rank}", json.dumps(asdict(facts)))
    found: list[str] = []
    if rank == 0:
        told = store.multi_get([f"facts/{other}" for other in range(world_size)])
        for path in markers:
            path.unlink()
        needed = checkpoint_bytes(cfg) if cfg.checkpoint.save else 0
        found = list(problems([Facts(**json.loads(text)) for text in told], needed))
    exit_on_any_problem(store, rank, world_size, "problems", found)


def problems(ranks: Sequence[Facts], checkpoint: int) -> Iterator[str]:
    """What keeps ranks from training together, in one line each: who, what, and the remedy.

    Args:
        ranks: rank 0 first; the others are held against it.
        checkpoint: bytes of one checkpoint; 0 if none is saved.
    """
    told: set[tuple[str, str]] = set()
    for facts in ranks:
        for problem in _problems_of(facts, ranks[0], checkpoint):
            if (facts.host, problem) not in told:  # once for each machine
                told.add((facts.host, problem))
                yield f"{facts}: {problem}"
    owners: dict[tuple[str, str], Facts] = {}
    for facts in ranks:
        owner = owners.setdefault((facts.host, facts.device_id), facts)
        if facts.device_id and owner is not facts:
            yield (
                f"{facts}: it has the GPU of rank {owner.rank} ({facts.device_id}). Start one process for each GPU,"
                " all in one torchrun, and let no process narrow CUDA_VISIBLE_DEVICES"
            )


def _problems_of(facts: Facts, first: Facts, checkpoint: int) -> Iterator[str]:
    for name in sorted(facts.versions.keys() | first.versions.keys()):
        mine, others = facts.versions.get(name, "not installed"), first.versions.get(name, "not installed")
        if mine != others:
            yield f"{name} is {mine}, and {others} on {first}. Use one installation on all machines"
    for name, (mine, others) in facts.settings.items():
        yield f"{name}={mine}, and {others} on {first}. Start every node by the same command"
    skew = facts.clock - first.clock
    if abs(skew) > MAX_CLOCK_SKEW_S:
        yield (
            f"its clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} that of {first}."
            " Synchronise the machines' clocks (NTP, chrony)"
        )
    if not facts.sees_run_dir:
        yield f"the run folder of {first} is not there. Set run_dir to a folder on a disk that all machines share"
    for name in facts.missing:
        yield f"{name} is not there. Put it on a disk that all machines share, by its whole path"
    if facts.free_bytes < checkpoint:
        yield (
            f"the run folder's disk has {facts.free_bytes / GIB:.1f} GiB free, and one checkpoint takes"
            f" {checkpoint / GIB:.1f}. Free some, set run_dir to a folder on another disk, or checkpoint.save=false if"
            " speed is all that is looked for"
        )
    if facts.device != first.device:
        seen = "no GPU is visible" if facts.device == "CPU" else f"its GPU is a {facts.device}"
        yield (
            f"{seen}, and {first} has {first.device}. Use machines of one kind, and look at nvidia-smi and"
            " CUDA_VISIBLE_DEVICES there"
        )


def _comparable(cfg: PretrainConfig) -> dict[str, Any]:
    """Settings by dotted name, but for the run folder, in which the ranks follow rank 0."""
    return {name: value for name, value in settings_by_name(asdict(cfg)) if name != "run_dir"}


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _differences(mine: dict[str, Any], others: dict[str, Any]) -> dict[str, list[Any]]:
    mine = json.loads(json.dumps(mine))  # tuples and lists are one
    return {
        name: [mine.get(name), others.get(name)]
        for name in sorted(mine.keys() | others.keys())
        if mine.get(name) != others.get(name)
    }


def _free_bytes(folder: Path) -> int:
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


def _appears(path: Path) -> bool:
    """Whether a file is there, or comes to be there soon."""
    until = time.monotonic() + _FOLDER_SEEN_S
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def _missing(cfg: PretrainConfig, cache_marker: str) -> list[str]:
    try:
        prefixes = parse_blend(cfg.data.path).prefixes
    except ConfigError as error:  # a dataset whose size is needed
        return [f"data.path {error.value}"]
    missing = [f"data.path {prefix}" for prefix in prefixes if not _appears(Path(f"{prefix}.idx"))]
    return missing if _appears(Path(cache_marker)) else [*missing, f"data.cache {cfg.data.cache}"]


def _device_id() -> str:
    return str(torch.cuda.get_device_properties(int(os.environ["LOCAL_RANK"])).uuid)
