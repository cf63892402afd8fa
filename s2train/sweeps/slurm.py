"""Submits the jobs of a sweep as Slurm batch jobs."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from s2train.config import SlurmSweepConfig
from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.sweeps.commands import batch_script, environment
from s2train.sweeps.jobs import LOG, Job, Status, last_error
from s2train.sweeps.launcher import SweepLauncher

SCRIPT, JOB_ID = "job.sbatch", "slurm_job_id"
_POLL_S = 15


class SlurmLauncher(SweepLauncher):
    """Launcher `hydra/launcher=s2train_slurm`, with settings `SlurmSweepConfig`."""

    def __init__(self, **settings: Any) -> None:
        self.settings: SlurmSweepConfig = SlurmSweepConfig(**settings)

    def check_settings(self) -> None:
        """Check that jobs can be submitted from here."""
        if self.settings.submit and shutil.which("sbatch") is None:
            remedy = "Start the sweep on a login node; hydra.launcher.submit=false only writes the scripts"
            raise ConfigError("hydra/launcher", "s2train_slurm", "this machine has no sbatch", remedy)
        learns = OmegaConf.select(self.config, "hydra.sweeper.n_trials") is not None
        if learns and not (self.settings.submit and self.settings.wait):
            problem = "hydra/sweeper learns from losses, which are known only when jobs have ended"
            raise ConfigError("hydra.launcher.wait", self.settings.wait, problem, "Set hydra.launcher.wait=true")

    def hardware(self) -> Hardware:
        """Placeholder for the nodes' device, which is not known here.

        Each job checks its memory itself.
        """
        return Hardware("a node's GPU", "cuda", sys.maxsize, per_machine=self.settings.nproc_per_node)

    def world_size(self) -> int:
        """Number of processes of a job."""
        return self.settings.nodes * self.settings.nproc_per_node

    def run(self, jobs: list[Job]) -> None:
        """Write all scripts, and submit those not queued or running."""
        for job in jobs:
            self._write(job)
            job.status = Status.WRITTEN
        if not self.settings.submit:
            return
        idle = [job for job in jobs if not _in_queue(job.folder)]
        for job in jobs:
            if job not in idle:
                job.status = Status.SUBMITTED
        for job in idle:
            self._submit(job)
        if self.settings.wait:
            self._wait([job for job in jobs if job.status is Status.SUBMITTED])

    def _write(self, job: Job) -> None:
        program, folder = self.program, job.folder
        folder.mkdir(parents=True, exist_ok=True)
        script = batch_script(
            self.settings, folder.name, folder, program.cwd, program.python, program.path, job.arguments
        )
        (folder / SCRIPT).write_text(script)
        print(f"wrote {folder / SCRIPT}", flush=True)

    def _submit(self, job: Job) -> None:
        command = ["sbatch", "--parsable", str(job.folder / SCRIPT)]
        done = subprocess.run(command, env=environment(os.environ, None), capture_output=True, text=True)
        if done.returncode:
            job.status, job.error = (
                Status.FAILED,
                f"sbatch: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}",
            )
            return
        job_id = done.stdout.strip().split(";")[0]  # `ID;CLUSTER`
        (job.folder / JOB_ID).write_text(job_id + "\n")
        job.status = Status.SUBMITTED
        print(f"submitted {job.label} as {job_id}", flush=True)

    def _wait(self, jobs: list[Job]) -> None:
        """Wait until all jobs have ended in Slurm.

        An interrupt only ends the waiting.
        """
        for job in jobs:
            while _in_queue(job.folder):
                time.sleep(_POLL_S)
            job.status = Status.FINISHED if job.is_finished else Status.FAILED
            if job.status is Status.FAILED:
                job.error = last_error(job.folder / LOG)
            self.record()


def _in_queue(folder: Path) -> bool:
    """Whether the job last submitted for a folder is waiting or running."""
    job_id = folder / JOB_ID
    if not job_id.is_file():
        return False
    command = ["squeue", "--noheader", "--format=%T", "--jobs", job_id.read_text().strip()]
    return bool(subprocess.run(command, capture_output=True, text=True).stdout.strip())
