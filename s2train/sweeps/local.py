"""Runs the jobs of a sweep on this machine."""

import os
import time
from contextlib import closing
from typing import Any

import torch

from s2train.config import LocalSweepConfig
from s2train.distributed.torchrun_logs import without_log_folders
from s2train.environment.hardware import Hardware, detect
from s2train.sweeps.commands import environment, on_one_node
from s2train.sweeps.gpus import divide_gpus, visible_gpus
from s2train.sweeps.jobs import LOG, Job, Status, last_error
from s2train.sweeps.launcher import SweepLauncher
from s2train.sweeps.processes import Command, run_all


class LocalLauncher(SweepLauncher):
    """Launcher `hydra/launcher=s2train_local`, with settings `LocalSweepConfig`."""

    def __init__(self, **settings: Any) -> None:
        self.settings: LocalSweepConfig = LocalSweepConfig(**settings)

    def check_settings(self) -> None:
        """Check that there are enough GPUs."""
        self.gpus_per_job = divide_gpus(self.settings, visible_gpus())

    def hardware(self) -> Hardware:
        """Device of this machine.

        On a CPU, all concurrent processes share the memory.
        """
        settings = self.settings
        return detect(0, settings.nproc_per_node * (1 if torch.cuda.is_available() else settings.n_jobs))

    def world_size(self) -> int:
        """Number of processes of a job."""
        return self.settings.nproc_per_node

    def run(self, jobs: list[Job]) -> None:
        """Run all jobs; a failed one doesn't stop the others."""
        with without_log_folders() as logs:  # the defaults: jobs inherit no PET_* variables
            self._run(jobs, logs)

    def _run(self, jobs: list[Job], logs: list[str]) -> None:
        """Run all jobs, with these options of torchrun."""
        program, settings = self.program, self.settings
        launcher = [program.python, "-m", "torch.distributed.run", *logs]
        commands = [
            Command(
                on_one_node(launcher, settings.nproc_per_node, program.path, job.arguments),
                job.folder / LOG,
                program.cwd,
            )
            for job in jobs
        ]
        started: dict[int, float] = {}

        def on_start(index: int) -> None:
            started[index] = time.monotonic()
            jobs[index].status = Status.STOPPED  # until it ends by itself
            print(f"started {jobs[index].label} | {commands[index].log}", flush=True)

        environments = [environment(os.environ, gpus) for gpus in self.gpus_per_job]
        with closing(run_all(commands, environments, on_start, settings.grace_s)) as ended:
            for index, returncode in ended:
                job = jobs[index]
                if returncode == 0 and job.is_finished:
                    job.status = Status.FINISHED
                else:
                    job.status, job.error = Status.FAILED, last_error(job.folder / LOG)
                self.record()
                print(
                    f"{job.status} {job.label} | {job.error or job.loss_text()} | "
                    f"{time.monotonic() - started[index]:.0f} s",
                    flush=True,
                )
