"""Incompatible ranks of a job are rejected at the start, with a remedy."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from s2train.costs.memory import checkpoint_bytes
from s2train.costs.parameters import total_parameters
from s2train.distributed import rendezvous
from s2train.environment.hardware import Hardware
from s2train.errors import MissingRankError, StartUpError
from s2train.planning import hybrid_layout
from s2train.training import startup
from s2train.training.startup import RankReport, check_start, problems
from tests.test_configs import pretrain
from tests.threads import in_threads

FIRST = RankReport(
    rank=0,
    host="alpha",
    versions={"torch": "2.11.0", "s2train": "0.1.0, sources abc"},
    settings={},
    clock=1e9,
    free_bytes=100,
    device="NVIDIA H100",
    device_id="GPU-0",
    sees_run_dir=True,
    missing=[],
)
SECOND = replace(FIRST, rank=8, host="beta")


def problems_of(**changes: Any) -> list[str]:
    return list(problems([FIRST, replace(SECOND, **changes)], checkpoint=100))


def test_ranks_that_agree_start() -> None:
    assert problems_of(clock=1e9 + 1) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"versions": FIRST.versions | {"torch": "2.9.0"}}, ["torch is 2.9.0, but 2.11.0", "same installation"]),
        ({"versions": {"torch": "2.11.0"}}, ["s2train is not installed"]),
        ({"settings": {"optim.lr": [0.1, 0.2]}}, ["optim.lr=0.1, but 0.2", "same command"]),
        ({"clock": 1e9 - 60}, ["60 s behind", "NTP"]),
        ({"clock": 1e9 + 3600}, ["3600 s ahead of", "NTP"]),
        ({"free_bytes": 99}, ["GiB free", "run_dir", "checkpoint.save=false"]),
        ({"sees_run_dir": False}, ["run folder", "all machines share"]),
        ({"missing": ["data.cache runs/cache"]}, ["can't see data.cache runs/cache", "all machines share"]),
        ({"device": "CPU"}, ["no GPU is visible", "NVIDIA H100", "CUDA_VISIBLE_DEVICES"]),
        ({"device": "NVIDIA A100"}, ["its GPU is a NVIDIA A100"]),
    ],
)
def test_an_incompatible_rank_is_reported_in_one_line_with_its_host_and_a_remedy(
    changes: dict[str, Any], words: list[str]
) -> None:
    (line,) = problems_of(**changes)
    assert line.startswith("rank 8 on beta: ")
    assert all(word in line for word in words), line
    assert "\n" not in line


def test_two_ranks_on_one_gpu_are_rejected() -> None:
    (line,) = problems_of(host="alpha", rank=1)
    assert line.startswith("rank 1 on alpha: it uses the same GPU as rank 0 (GPU-0). Start one process per GPU")
    assert problems_of(host="alpha", rank=1, device_id="GPU-1") == []


def test_a_problem_of_a_whole_machine_is_reported_once() -> None:
    ranks = [replace(SECOND, rank=8 + i, device_id=f"GPU-{i}", free_bytes=0) for i in range(8)]
    assert len(list(problems([FIRST, *ranks], checkpoint=100))) == 1


def start(run_dirs: list[Path], more: tuple[str, ...] = (), **changes: dict[int, dict[str, Any]]) -> list[Any]:
    """Run `check_start` with a thread per rank; each rank's run folder or error."""
    store, ends = torch.distributed.HashStore(), {}
    plan: Any = SimpleNamespace(hardware=Hardware("CPU", "cpu", 1 << 40))

    # Composed here, because Hydra is not thread-safe.
    cfgs = [pretrain("+model=tiny_hybrid", "data.path=mock", f"run_dir={run_dir}", *more) for run_dir in run_dirs]

    def one(rank: int) -> None:
        cfg = cfgs[rank]
        for name, value in changes.get("settings", {}).get(rank, {}).items():
            setattr(cfg, name, value)
        try:
            check_start(cfg, plan, store, rank, len(run_dirs))
            ends[rank] = cfg.run_dir
        except StartUpError as error:
            ends[rank] = error

    in_threads(len(run_dirs), one)
    return [ends[rank] for rank in range(len(run_dirs))]


def test_all_ranks_take_the_run_folder_of_rank_0(tmp_path: Path) -> None:
    assert start([tmp_path / "a", tmp_path / "b", tmp_path / "c"]) == [str(tmp_path / "a")] * 3
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]


def test_every_rank_stops_if_one_has_another_setting(tmp_path: Path) -> None:
    ends = start([tmp_path] * 3, settings={2: {"seed": 7}})
    assert all(isinstance(end, StartUpError) for end in ends)
    (line,) = ends[0].problems
    assert "rank 2" in line
    assert "seed=7, but 1234 on rank 0" in line


def test_a_rank_that_can_not_see_the_teacher_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "_FILE_VISIBLE_S", 0.0)
    kind = f"+layout.kinds.E={{kind:block_selection,top_k:1,teacher:{tmp_path}/dense}}"
    cfg = pretrain("+model=tiny_hybrid", "layout.layers=DE", kind, "data.path=mock")
    assert startup.missing_inputs(cfg, str(tmp_path)) == [f"layout.kinds.E.teacher {tmp_path}/dense"]
    (tmp_path / "dense").mkdir()
    assert startup.missing_inputs(cfg, str(tmp_path)) == []


def test_a_run_that_saves_nothing_needs_no_space_for_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1))
    (end,) = start([tmp_path])
    assert isinstance(end, StartUpError)
    assert "one checkpoint takes" in end.problems[0]
    assert start([tmp_path], more=("checkpoint.save=false",)) == [str(tmp_path)]


def test_a_rank_that_never_starts_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "START_TIMEOUT", timedelta(seconds=0.2))
    plan: Any = SimpleNamespace(hardware=Hardware("CPU", "cpu", 1 << 40))
    cfg = pretrain("+model=tiny_hybrid", f"run_dir={tmp_path}")
    with pytest.raises(MissingRankError, match="rank 1, 2 of 3 did not start within"):
        check_start(cfg, plan, torch.distributed.HashStore(), 0, 3)


@pytest.mark.parametrize(
    ("precision", "distributed", "expected"),
    [("bf16", True, 14), ("bf16", False, 14), ("fp32", True, 16), ("fp32", False, 12)],
)
def test_a_checkpoint_holds_weights_and_fp32_optimizer_state(precision: str, distributed: bool, expected: int) -> None:
    cfg = pretrain("+model=tiny_hybrid", f"train.precision={precision}")
    cfg.parallel.distributed_optimizer = distributed
    hybrid = hybrid_layout(cfg)
    assert checkpoint_bytes(cfg, hybrid) == expected * total_parameters(cfg.model, hybrid.layers)
