"""Runs programs on one or several ranks, and records their results."""

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import Signals
from threading import Event
from typing import Any

import torch

from s2train.checkpoints.listing import checkpoint_at
from s2train.errors import ConfigError
from s2train.scaling.launchers import Launch, Launcher
from s2train.scaling.recorded import Recorded
from s2train.training.records import read_records

_ROOT = Path(__file__).parents[2]
# Settings that runs vary and that a command may set for the others: those of a job come after the command's.
_VARIED = ("parallel.cp_exchange", "attention_backend", "dense_attention")
# Settings of jobs that a command may replace: no comparison depends on them.
_OPEN = ("data", "train.recompute", "optim.warmup_steps")
_DIVIDED = ("parallel.tp", "parallel.pp", "parallel.cp")  # by jobs alone, also those that leave them at 1


@dataclass(frozen=True)
class Job:
    """A training run.

    Attributes:
        name: of its run folder and results.
        processes: number of ranks.
        settings: for `launch/pretrain.py`.
        saves: steps whose checkpoints others read: without them in the run folder, the job is not done.
        after: name of the job from whose checkpoint it starts: its result is void when that job runs again.
    """

    name: str
    processes: int
    settings: tuple[str, ...]
    saves: tuple[int, ...] = ()
    after: str | None = None


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
    def losses(self) -> list[float | None]:
        """Loss of each step; None if it was not finite."""
        return [record["loss"] for record in self.records if "loss" in record]


class Runner:
    """Runs programs on this machine's devices, unless their results are recorded.

    Args:
        folder: folder for run folders and logs; if it exists, it must be of the same commands.
        devices: number of GPUs to use, or of processes on a CPU.
        recorded: results of finished jobs.
        launch: starts the ranks of a program.
        settings: settings appended to those of every training run; see `check`.
        timeout_s: a program is killed after this time.
    """

    def __init__(
        self,
        folder: Path,
        devices: int,
        recorded: Recorded,
        launch: Launcher,
        settings: Sequence[str] = (),
        timeout_s: float = 300,
    ) -> None:
        self.folder, self.devices, self.recorded = folder, devices, recorded
        self._launch, self._settings, self.timeout_s = launch, tuple(settings), timeout_s
        self._stopped = Event()

    def check(self, part: str, jobs: Sequence[Job]) -> None:
        """Check that the command's settings leave a part's jobs what they are.

        Raises:
            ConfigError: a setting would replace one of the jobs'.
        """
        of_jobs = [dict(map(_name_and_value, job.settings)) for job in jobs]
        for name, value in map(_name_and_value, self._settings):
            values = list(dict.fromkeys(settings.get(name) for settings in of_jobs))
            if name in (*_VARIED, *_OPEN) or values == [value] or (values == [None] and name not in _DIVIDED):
                continue
            own = " or ".join(f"{name}={found}" for found in values if found is not None) or "its default"
            remedy = "Leave it out, set it by an option (see --help), or choose other parts"
            raise ConfigError(name, value, f"runs of --{part} need {own}", remedy)

    def run(self, jobs: Sequence[Job], at_once: int = 1) -> dict[str, Outcome]:
        """Run jobs and return all outcomes, as `run_each` does."""
        outcomes = dict(self.run_each(jobs, at_once))
        return {job.name: outcomes[job.name] for job in jobs}

    def run_each(self, jobs: Sequence[Job], at_once: int = 1) -> Iterator[tuple[str, Outcome]]:
        """Run jobs, and yield each name and outcome.

        Jobs on part of the devices run first: those of one size side by side, on separate devices.

        Args:
            at_once: number of jobs on all devices to run concurrently, if their speed does not matter.
        """
        for size in sorted({job.processes for job in jobs}):
            own = [job for job in jobs if job.processes == size]
            places = self.devices // size
            if places <= 1:
                yield from self._run_at_once([(0, job) for job in own], at_once)
                continue
            for first in range(0, len(own), places):
                side_by_side = own[first : first + places]
                yield from self._run_at_once([(place * size, job) for place, job in enumerate(side_by_side)], places)

    def checkpoint(self, job: str, step: int) -> Path:
        """Folder in which a job saved this step."""
        return checkpoint_at(self._path(job), step)

    def worker(self, module: str, name: str, *arguments: str) -> dict[str, Any]:
        """Run a module on all devices, and read its JSON file.

        The file is its first argument, and that of recorded results its second. Returns {"error": …} if the module
        failed.
        """
        output = self._path(name).with_suffix(".json")
        program = ["-m", module, str(output), str(self.recorded.path.absolute()), *arguments]
        error = None if output.is_file() else self._start(name, self.devices, program, 0)
        self.recorded.read()
        result: dict[str, Any] = json.loads(output.read_text()) if error is None else {"error": error}
        return result

    def measure(self, module: str, name: str, *arguments: str) -> Iterator[dict[str, Any]]:
        """Yield what `worker` returns, when it is asked for."""
        yield self.worker(module, name, *arguments)

    def _run_at_once(self, placed: Sequence[tuple[int, Job]], at_once: int) -> Iterator[tuple[str, Outcome]]:
        """Run jobs, each from a device on."""
        with ThreadPoolExecutor(at_once) as pool:
            futures = {pool.submit(self._run, job, device): job.name for device, job in placed}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BaseException:  # an interrupted command ends what runs, and starts no more
                self._stopped.set()
                for future in futures:
                    future.cancel()
                raise

    def _run(self, job: Job, first_device: int) -> Outcome:
        found = self.recorded.get(job.name)
        if found is not None and all(self.checkpoint(job.name, step).is_dir() for step in job.saves):
            return Outcome(found["records"], None, found["seconds"])
        run_dir, began = self._path(job.name), time.monotonic()
        self.recorded.forget(lambda result: result.get("after") == job.name)
        shutil.rmtree(run_dir, ignore_errors=True)  # of an interrupted run, whose metrics would count twice
        varied = [word for word in job.settings if _name_and_value(word)[0] in _VARIED]
        settings = (*job.settings, *self._settings, *varied, f"run_dir={run_dir}")
        program = [str(_ROOT / "launch" / "pretrain.py"), *settings]
        error = self._start(job.name, job.processes, program, first_device)
        records = read_records(run_dir / "metrics.jsonl") if error is None else []
        outcome = Outcome(records, error, time.monotonic() - began)
        if error is None:
            self.recorded.add(job.name, {**asdict(outcome), "after": job.after})
        print(f"{job.name}: {error or 'done'}, {outcome.seconds:.0f} s", flush=True)
        return outcome

    def _start(self, name: str, processes: int, program: Sequence[str], first_device: int) -> str | None:
        """Run a program to its end; returns its error or None."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self._path(name).with_suffix(".log")
        environment = rank_environment(first_device, processes)
        status = self._launch(Launch(program, processes, environment, log, self.timeout_s, self._stopped))
        if status == 0:
            return None
        if self._stopped.is_set():
            return "interrupted"
        if status is None:
            return f"ran past its limit of {self.timeout_s:.0f} s, which --timeout sets; see {log}"
        errors = [line for line in log.read_text(errors="replace").splitlines() if "rror: " in line]
        return (errors[0].strip()[:300] if errors else _end_of(status)) + f"; see {log}"

    def _path(self, name: str) -> Path:
        return self.folder / name.replace(" ", "-")


def _name_and_value(setting: str) -> tuple[str, str]:
    name, _, value = setting.partition("=")
    return name.lstrip("+~"), value


def _end_of(status: int) -> str:
    """Say how a rank ended that printed no error."""
    if status >= 0:
        return f"ended with status {status}"
    by_memory = ", perhaps because memory ran out" if -status == Signals.SIGKILL else ""
    return f"a rank was ended by {Signals(-status).name}{by_memory}"


def rank_environment(first_device: int, count: int) -> dict[str, str]:
    """Return the environment of ranks on `count` devices from `first_device` on."""
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), environment.get("PYTHONPATH")]))
    if torch.cuda.is_available():
        named = environment.get("CUDA_VISIBLE_DEVICES")
        names = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[first_device : first_device + count])
    return environment
