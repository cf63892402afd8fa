"""Runs programs under torchrun, concurrently on separate devices, and reads their results."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from s2train.distributed.parent_death_signal import signal_on_parent_death

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Job:
    """A training run: its name, number of processes, and settings for `launch/pretrain.py`."""

    name: str
    processes: int
    settings: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """Outcome of a job.

    Attributes:
        records: records of metrics.jsonl.
        error: line of its log that names an error; None if it succeeded.
        seconds: time from start to end.
    """

    records: list[dict[str, Any]]
    error: str | None
    seconds: float

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records if "loss" in record]


class Runner:
    """Runs programs on this machine's devices, unless they are already done.

    Args:
        folder: folder for run folders and logs; if it exists, it must be of the same commands.
        devices: number of GPUs to use, or of processes on a CPU.
        settings: settings appended to those of every training run.
        timeout_s: a program is killed after this time.
    """

    def __init__(self, folder: Path, devices: int, settings: Sequence[str] = (), timeout_s: float = 300) -> None:
        self.folder, self.devices = folder, devices
        self._settings, self._timeout_s = tuple(settings), timeout_s

    def run(self, jobs: Sequence[Job], at_once: int = 1) -> dict[str, Outcome]:
        """Run jobs of one process concurrently, one per device, then the others.

        Args:
            at_once: number of the others to run concurrently on all devices, if their speed does not matter.
        """
        small = [job for job in jobs if job.processes == 1]
        outcomes: dict[str, Outcome] = {}
        with ThreadPoolExecutor(self.devices) as pool:
            for first in range(0, len(small), self.devices):
                batch = small[first : first + self.devices]
                for job, outcome in zip(batch, pool.map(self._run, batch, range(len(batch))), strict=True):
                    outcomes[job.name] = outcome
        large = [job for job in jobs if job.processes > 1]
        with ThreadPoolExecutor(at_once) as pool:
            outcomes |= {job.name: outcome for job, outcome in zip(large, pool.map(self._run, large), strict=True)}
        return {job.name: outcomes[job.name] for job in jobs}

    def checkpoint(self, job: str, step: int) -> Path:
        """Folder in which a job saved this step."""
        return self._path(job) / "checkpoints" / f"iter_{step:07d}"

    def worker(self, module: str, name: str, *arguments: str) -> dict[str, Any]:
        """Run a module on all devices, and read its JSON file.

        The file is its first argument. Returns {"error": …} if the module failed.
        """
        output = self._path(name).with_suffix(".json")
        program = ["-m", module, str(output), *arguments]
        error = None if output.is_file() else self._start(name, self.devices, program, 0)
        result: dict[str, Any] = json.loads(output.read_text()) if error is None else {"error": error}
        return result

    def _run(self, job: Job, first_device: int = 0) -> Outcome:
        run_dir, began = self._path(job.name), time.monotonic()
        program = [str(_ROOT / "launch" / "pretrain.py"), *job.settings, *self._settings, f"run_dir={run_dir}"]
        done, error = run_dir / "done", None
        if not done.is_file():
            shutil.rmtree(run_dir, ignore_errors=True)  # of an interrupted run, whose metrics would count twice
            error = self._start(job.name, job.processes, program, first_device)
            if error is None:
                done.touch()
        metrics = run_dir / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if error is None else []
        outcome = Outcome([json.loads(line) for line in lines], error, time.monotonic() - began)
        print(f"{job.name}: {error or 'done'}, {outcome.seconds:.0f} s", flush=True)
        return outcome

    def _start(self, name: str, processes: int, program: Sequence[str], first_device: int) -> str | None:
        """Run a program to its end; returns its error or None."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self._path(name).with_suffix(".log")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        with log.open("w") as file:
            process = subprocess.Popen(
                [*launcher, *program],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=_environment(first_device, processes),
                start_new_session=True,
                # otherwise torchrun and its ranks would hold the devices after this process is killed
                preexec_fn=partial(signal_on_parent_death, signal.SIGTERM),
            )
            try:
                status = process.wait(self._timeout_s)
            except BaseException as interruption:
                os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its ranks
                process.wait()
                if isinstance(interruption, subprocess.TimeoutExpired):
                    return f"not done after {self._timeout_s:.0f} s; see {log}"
                raise
        if status == 0:
            return None
        errors = [line for line in log.read_text(errors="replace").splitlines() if "rror: " in line]
        return (errors[0].strip()[:300] if errors else f"status {status}") + f"; see {log}"

    def _path(self, name: str) -> Path:
        return self.folder / name.replace(" ", "-")


def _environment(first_device: int, count: int) -> dict[str, str]:
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron needs it to overlap tensor parallelism
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), environment.get("PYTHONPATH")]))
    if torch.cuda.is_available():
        named = environment.get("CUDA_VISIBLE_DEVICES")
        names = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[first_device : first_device + count])
    return environment
