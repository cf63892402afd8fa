"""Compiles a cold start's kernels in processes beside a rank's imports.

Each process runs one part of what `s2train.training.warm_up` runs, or Liger-Kernel's operations, and so fills the disk
caches of Triton and FlashAttention-4. Afterwards the rank runs everything as ever: it reads what was compiled, and
compiles what was not. Threads don't serve: Triton holds Python's lock, and CuTe fails in a second thread.
"""

import hashlib
import json
import os
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import IO

import torch

from s2train.attention.hybrid import HybridLayout
from s2train.config import PretrainConfig, settings_by_name
from s2train.environment.cores import available_cores
from s2train.environment.hardware import Hardware
from s2train.environment.imports import quick_imports
from s2train.environment.liger import choose_loss, liger_operations, liger_problem
from s2train.environment.transformer_engine import uses_te
from s2train.environment.versions import versions
from s2train.kernels.flash4 import fa4_cache_folder, fa4_problem
from s2train.planning import hybrid_layout
from s2train.training.warm_up import Part, compile_kernels
from s2train.training.worker_process import start_worker, worker_command
from s2train.validation.libraries import uses_fa4
from s2train.wandb_run import say

SECONDS = 120.0  # for all processes, many times what they take; a rank then compiles itself
_LIGER = "Liger-Kernel"
_WORKER = "s2train.training.compile_worker"
# Settings that choose kernels, or shapes for which they are compiled.
_SETTINGS = (
    *("model", "layout", "parallel", "attention_backend", "dense_attention", "elementwise", "loss", "layer_backend"),
    *("train.seq_length", "train.micro_batch_size", "train.precision", "data.attention_within_documents"),
)


@dataclass(frozen=True)
class Task:
    """What one process compiles.

    Attributes:
        part: of the attention kernels; None: Liger-Kernel's.
        began: `time.monotonic()` at its start.
    """

    part: Part | None
    cfg: PretrainConfig
    hardware: Hardware
    device: torch.device
    cp_rank: int
    began: float

    @property
    def name(self) -> str:
        """Such as "dense backward"."""
        return _LIGER if self.part is None else str(self.part)


class Compilers:
    """Processes that compile, each with the file of its output.

    Args:
        command: of a process, which reads its task from standard input.
    """

    def __init__(self, tasks: list[Task], command: list[str]) -> None:
        self.began = time.monotonic()
        self._running: dict[str, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
        for task in tasks:
            output = tempfile.TemporaryFile()  # noqa: SIM115 (`_end` reads it)
            self._running[task.name] = start_worker(command, task, output, subprocess.STDOUT), output

    def wait(self, seconds: float = SECONDS) -> str:
        """Wait for all processes, and describe them in one line.

        Names those that failed or took longer than `seconds`, and why. The rank compiles their kernels then.
        """
        lines = [self._end(*running, self.began + seconds) for running in self._running.values()]
        done = ", ".join(f"{name} {line}" for name, line in zip(self._running, lines, strict=True))
        return f"compiled in {len(lines)} processes beside the imports, seconds from their start: {done}"

    def _end(self, process: subprocess.Popen[bytes], output: IO[bytes], until: float) -> str:
        try:
            status = process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return f"(no end after {until - self.began:.0f} s: compiled by the rank instead)"
        output.seek(0)
        text = [line.strip() for line in output.read().decode(errors="replace").splitlines() if line.strip()]
        last = text[-1] if text else "no output"
        return last if status == 0 else f"(failed with status {status}, {last[:200]}: compiled by the rank instead)"


def start_compilers(cfg: PretrainConfig, hybrid: HybridLayout, hardware: Hardware) -> Compilers | None:
    """Start the processes of a machine, before Megatron's imports.

    Call `use_cache_folders` before. None on a CPU, on other ranks than a machine's first, if an earlier run has filled
    the caches, in deterministic runs, if there are fewer cores than ranks and processes, or in a fork of a process
    that has imported everything: it would only wait for the processes' imports.
    """
    if hardware.kind != "cuda" or os.environ.get("LOCAL_RANK", "0") != "0" or parent_process() is not None:
        return None
    try:
        return _start(cfg, hybrid, hardware)
    except (OSError, KeyError) as error:  # no memory or disk; a user without a name
        say(f"the rank compiles all kernels itself: no processes could be started ({error})")
        return None


def _start(cfg: PretrainConfig, hybrid: HybridLayout, hardware: Hardware) -> Compilers | None:
    if cfg.train.deterministic or all(mark.exists() for mark in _marks(cfg, hybrid, hardware)):
        return None
    rank, tp = int(os.environ.get("RANK", "0")), cfg.parallel.tp
    cp_rank, began = rank // tp % cfg.parallel.cp, time.monotonic()  # Megatron's order of ranks
    tasks = [
        Task(part, cfg, hardware, torch.device("cuda", 0), cp_rank, began) for part in parts(cfg, hybrid, hardware)
    ]
    if available_cores() < int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + len(tasks):
        return None
    return Compilers(tasks, worker_command(_WORKER)) if tasks else None


def parts(cfg: PretrainConfig, hybrid: HybridLayout, hardware: Hardware) -> list[Part | None]:
    """Divide a run's kernels among processes; None are Liger-Kernel's.

    No kernel is in two parts. Empty if there is only one, which the rank compiles as fast.
    """
    found: list[Part | None] = []
    fa4 = uses_fa4(cfg, hybrid, hardware)
    if cfg.attention_backend != "torch":
        if fa4:
            found += [Part("dense", "backward"), Part("dense", "forward")]
        if any(layer.is_static and not layer.is_dense for layer in hybrid.layers):
            found += [Part("sparse" if fa4 else "static", "forward"), Part("sparse" if fa4 else "static", "backward")]
        if not all(layer.is_static for layer in hybrid.layers):
            found.append(Part("data-dependent", "passes"))
    if _liger(cfg, hardware) != (frozenset(), "torch"):
        found.append(None)
    return found if len(found) > 1 else []


def compile_here(task: Task) -> None:
    """Compile a task's kernels in this process.

    Raises:
        RuntimeError: a library can't be imported.
    """
    problem = None
    if task.part is None or task.part.layers == "data-dependent" or task.cfg.parallel.cp > 1:
        from s2train.megatron.lazy_imports import import_megatron

        import_megatron()
    with quick_imports():
        if task.part is None:
            problem = liger_problem()
        elif task.part.layers == "dense":
            problem = fa4_problem()
    if problem is not None:
        raise RuntimeError(problem)
    if task.part is not None:
        compile_kernels(task.cfg, hybrid_layout(task.cfg), task.device, task.cp_rank, task.part)
        return
    from s2train.megatron.liger_warm_up import compile_liger

    compile_liger(task.cfg, *_liger(task.cfg, task.hardware), task.device)
    torch.cuda.synchronize(task.device)


def mark_compiled(cfg: PretrainConfig, hybrid: HybridLayout, hardware: Hardware) -> None:
    """Mark the cache folders as filled by a run of these settings."""
    with suppress(OSError):  # a full disk: the next start compiles again
        for mark in _marks(cfg, hybrid, hardware):
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()


def _marks(cfg: PretrainConfig, hybrid: HybridLayout, hardware: Hardware) -> list[Path]:
    """Return a mark's path in each cache folder.

    Its name hashes what kernels depend on. Whoever empties a folder removes its mark too.
    """
    settings = {name: value for name, value in settings_by_name(asdict(cfg)) if name.startswith(_SETTINGS)}
    content = json.dumps([settings, versions(), hardware.name], sort_keys=True, default=str)
    digest = hashlib.sha256(content.encode()).hexdigest()[:24]
    folders = [Path(os.environ["TRITON_CACHE_DIR"])]
    if uses_fa4(cfg, hybrid, hardware):
        folders.append(fa4_cache_folder())
    return [folder / "s2train_compiled" / digest for folder in folders]


def _liger(cfg: PretrainConfig, hardware: Hardware) -> tuple[frozenset[str], str]:
    te = uses_te(cfg, hardware)
    return liger_operations(cfg, hardware.capability, te), choose_loss(cfg, hardware.capability, te)
