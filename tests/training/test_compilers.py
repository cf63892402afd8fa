"""A cold start's kernels are compiled in processes, each once, and what fails there is left to the rank."""

import gc
import os
import pickle
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from s2train.kernels import dense_choice
from s2train.kernels.verified import VERIFIED

from s2train.environment.hardware import Hardware
from s2train.planning import hybrid_layout
from s2train.training import compile_worker, compilers
from s2train.training.compilers import Compilers, Task, mark_compiled, parts, start_compilers
from s2train.training.warm_up import Part
from tests.test_configs import pretrain

H200 = Hardware("NVIDIA H200", "cuda", 150_000_000_000, capability=(9, 0))
DENSE, SPARSE, STATIC = (
    [Part(layers, "backward"), Part(layers, "forward")] for layers in ("dense", "sparse", "static")
)


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Both libraries in the verified releases, 16 cores, and empty cache folders."""
    releases = {entry.library: entry.release for entry in VERIFIED}
    for name in ("LOCAL_RANK", "RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(tmp_path / "fa4"))
    monkeypatch.setattr(dense_choice, "installed_version", releases.get)
    monkeypatch.setattr("s2train.environment.liger.installed_version", releases.get)
    monkeypatch.setattr(compilers, "available_cores", lambda: 16)
    monkeypatch.setattr(compilers, "Compilers", lambda tasks, command: [task.name for task in tasks])
    return releases


def started(*settings: str, hardware: Hardware = H200) -> Any:
    cfg = pretrain("+model=125m_hybrid", *settings)
    return start_compilers(cfg, hybrid_layout(cfg), hardware)


def raising(error: Exception) -> Any:
    def fail(*_: Any) -> None:
        raise error

    return fail


def test_each_kernel_is_in_one_part(installed: dict[str, str]) -> None:
    def found(*settings: str) -> list[Part | None]:
        cfg = pretrain("+model=125m_hybrid", *settings)
        return sorted(parts(cfg, hybrid_layout(cfg), H200), key=str)

    assert found() == [None, *DENSE, *SPARSE]
    assert found("layout.layers=S") == [None, *STATIC]
    assert found("layout=dense", "loss=torch", "elementwise=torch") == DENSE
    of_data = Part("data-dependent", "passes")
    assert found("layout=moba_b64_k16") == [None, of_data, *DENSE]
    del installed["flash-attn-4"]
    assert found() == [None, *STATIC]  # dense layers may run the sparse layers' kernels
    del installed["liger-kernel"]
    assert found() == STATIC
    assert found("attention_backend=torch") == []


def test_one_process_alone_is_not_started() -> None:
    assert started("attention_backend=torch") is None  # Liger-Kernel's


def test_only_a_machines_first_rank_with_a_gpu_and_idle_cores_starts_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(started()) == 5
    assert started(hardware=Hardware("CPU", "cpu", 1)) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "12")
    assert started() is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert len(started()) == 5
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert started() is None


def test_a_fork_with_nothing_left_to_import_starts_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "parent_process", lambda: SimpleNamespace(name="MainProcess"))
    assert started() is None


def test_a_run_starts_where_processes_cannot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compilers, "Compilers", raising(OSError("Cannot allocate memory")))
    assert started() is None
    assert "the rank compiles all kernels itself: no processes could be started (Cannot allocate memory)" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("emptied", ["triton", "fa4"])
def test_nothing_is_started_while_the_caches_hold_an_earlier_runs_kernels(emptied: str, tmp_path: Path) -> None:
    cfg = pretrain("+model=125m_hybrid")
    mark_compiled(cfg, hybrid_layout(cfg), H200)
    assert started("train.steps=7", "run_dir=elsewhere") is None
    assert started("train.micro_batch_size=3") is not None
    for path in (tmp_path / emptied / "s2train_compiled").iterdir():
        path.unlink()
    assert started() is not None


def wait(program: str, *names: str, seconds: float = 20.0) -> str:
    cfg = pretrain("+model=125m_hybrid")
    of = {str(part): part for part in (*DENSE, *SPARSE, None)}
    tasks = [Task(of[name], cfg, H200, torch.device("cuda", 0), 0, time.monotonic()) for name in names]
    return Compilers(tasks, [sys.executable, "-c", program]).wait(seconds)


def test_the_log_says_what_took_which_time() -> None:
    line = wait("print('a warning'); print(3.1)", "dense forward", "None")
    assert line.startswith("compiled in 2 processes beside the imports")
    assert line.endswith(": dense forward 3.1, Liger-Kernel 3.1")


def test_the_log_says_what_failed_and_why() -> None:
    line = wait("raise ValueError('no such kernel')", "sparse forward")
    assert "sparse forward (failed with status 1, ValueError: no such kernel: compiled by the rank instead)" in line


def test_a_process_that_hangs_is_ended() -> None:
    began = time.monotonic()
    line = wait("import time; time.sleep(600)", "dense backward", "dense forward", seconds=0.5)
    assert time.monotonic() - began < 600
    assert line.count("(no end after 0 s: compiled by the rank instead)") == 2


@pytest.mark.parametrize("parent", ["alive", "dead"])
def test_a_process_compiles_its_task_while_its_parent_lives(
    parent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    number = os.getppid() if parent == "alive" else -1
    task = Task(DENSE[0], pretrain("+model=125m_hybrid"), H200, torch.device("cuda", 0), 0, time.monotonic() - 7)
    (tmp_path / "task").write_bytes(pickle.dumps((number, task)))
    done: list[Any] = []
    for module, name in ((gc, "disable"), (compile_worker, "signal_on_parent_death")):
        monkeypatch.setattr(module, name, lambda: None)
    monkeypatch.setattr(compilers, "compile_here", done.append)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(os, "_exit", done.append)
    with (tmp_path / "task").open("rb") as file:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=file))
        compile_worker.main()
    assert done == ([task.device, task, 0] if parent == "alive" else [])
    assert capsys.readouterr().out == ("7.0\n" if parent == "alive" else "")
