"""Launches the jobs of Hydra's sweepers: `python launch/pretrain.py -m …`.

All jobs are composed and checked before the first starts. Each has a folder under `hydra.sweep.dir` that is named by
its overrides, so that the same command, started again, skips finished jobs and resumes the rest. Another sweep into the
same folder adds its jobs to the table.
"""

import os
import sys
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from s2train.checkpoints.named_start import named_start
from s2train.command_line.overrides import quoted
from s2train.command_line.program import run_command
from s2train.config import PretrainConfig, SweepConfig
from s2train.environment.hardware import Hardware
from s2train.errors import INTERRUPTED_STATUS, USAGE_STATUS, ConfigError
from s2train.files import check_writable
from s2train.planning import Plan, asked_plan, check, check_memory, resolve
from s2train.sweeps.jobs import Job, Status, changed_setting, read_record, relabel, write_record
from s2train.sweeps.names import job_folder, label, setting_and_value


@dataclass(frozen=True)
class Program:
    """Program that every job runs.

    Attributes:
        arguments: arguments that select the Hydra config.
    """

    python: str
    path: Path
    cwd: Path
    arguments: list[str]


class SweepLauncher(Launcher):
    """Checks and runs jobs, and returns losses to the sweeper.

    Skips finished jobs.
    """

    settings: SweepConfig

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Implement Hydra's interface; rejects bad settings of the sweep."""
        self.context, self.config = hydra_context, config
        self.sweep_dir = Path(config.hydra.runtime.cwd, config.hydra.sweep.dir)
        self.program = _program(config)
        self.swept = _swept_settings(hydra_context, config)
        self.jobs: dict[Path, Job] = {}
        self.trials = 0  # proposals so far, including repeated ones
        self.earlier = [
            replace(job, is_earlier=True) for job in read_record(self.sweep_dir) if job.summary() is not None
        ]
        run_command(self._check_sweep)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run one batch of jobs (Hydra's interface).

        A job without a loss returns None as COMPLETED, since a FAILED one would make Hydra's own sweeper end the sweep.
        """
        if not job_overrides:
            run_command(_reject_empty)
        batch = [self._prepare(filter_overrides(overrides)) for overrides in job_overrides]
        run_command(lambda: self._run_batch(list({job.folder: job for job in batch}.values())))
        self.trials += len(batch)
        trials = OmegaConf.select(self.config, "hydra.sweeper.n_trials")
        is_planned = all(job.status is Status.PLANNED for job in batch)  # without a loss, no proposal would follow
        if trials is not None and (is_planned or self.trials == trials):
            self._end_without_losses()
        return [
            JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED, _return_value=job.loss())
            for overrides, job in zip(job_overrides, batch, strict=True)
        ]

    @abstractmethod
    def check_settings(self) -> None:
        """Check that jobs can be started here with these settings.

        Raises:
            ConfigError: they can't.
        """

    @abstractmethod
    def hardware(self) -> Hardware:
        """Device of one process of a job."""

    @abstractmethod
    def world_size(self) -> int:
        """Number of processes of a job."""

    @abstractmethod
    def run(self, jobs: list[Job]) -> None:
        """Run checked, unfinished jobs, and set their status."""

    def record(self) -> None:
        """Write the record of all jobs.

        Includes jobs of earlier sweeps in this folder.
        """
        jobs = list(self.jobs.values())
        known = {job.folder.name for job in jobs}
        earlier = [job for job in self.earlier if job.folder.name not in known]
        write_record(self.sweep_dir, relabel([*earlier, *jobs]) if earlier else jobs)

    def _end_without_losses(self) -> None:
        """End the sweep if no trial has a loss.

        Otherwise optuna's sweeper would look for the best one, and raise.
        """
        jobs = list(self.jobs.values())
        if any(job.loss() is not None for job in jobs):
            return
        self._print_report()
        if all(job.status is Status.PLANNED for job in jobs):
            sys.exit(0)
        print(
            f"error: none of {len(jobs)} jobs has a loss for hydra/sweeper to learn from", file=sys.stderr, flush=True
        )
        sys.exit(1)

    def _print_report(self) -> None:
        from s2train.sweeps.report import report  # matplotlib: slow, and no single run needs it

        report(self.sweep_dir)

    def _check_sweep(self) -> None:
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            remedy = "Start it with `python launch/pretrain.py -m …` and hydra.launcher.nproc_per_node=N"
            problem = "a sweep starts a torchrun for each job, and must not run inside one"
            raise ConfigError("-m", "multirun", problem, remedy)
        for name in ("nproc_per_node", "n_jobs", "nodes"):
            value = getattr(self.settings, name, 1)
            if value < 1:
                raise ConfigError(f"hydra.launcher.{name}", value, "must be more than 0", f"Set {name} to 1 or more")
        for override in self.config.hydra.overrides.task:
            if setting_and_value(override)[0] == "run_dir":
                raise ConfigError("run_dir", "…", "each job has its own folder", "Set hydra.sweep.dir=FOLDER")
        check_writable("hydra.sweep.dir", self.sweep_dir)
        self.check_settings()

    def _prepare(self, overrides: Sequence[str]) -> Job:
        """Compose and check the job of some overrides."""
        folder = job_folder(self.sweep_dir, overrides, self.swept)
        if folder in self.jobs:
            return self.jobs[folder]
        values = dict(setting_and_value(override) for override in overrides)
        swept = {setting: values[setting] for setting in self.swept if setting in values}
        arguments = [*self.program.arguments, *overrides, f"run_dir={quoted(folder)}"]
        job = self.jobs[folder] = Job(folder, label(overrides, self.swept), swept, arguments)
        try:
            loader = self.context.config_loader
            composed = loader.load_sweep_config(self.config, list(overrides))
            with open_dict(composed):
                del composed["hydra"]
            cfg = resolve(composed, loader.get_group_options("model"), overrides)
            job.add_plan(self._plan(cfg))
            if not job.is_finished:
                named_start(replace(cfg, run_dir=str(folder)))  # rejects what the job would
        except (ConfigError, HydraException, OmegaConfBaseException) as error:
            job.status, job.error = Status.REJECTED, str(error).splitlines()[0]
            return job
        if cfg.tracking.group is None:
            job.arguments.append(f"tracking.group={quoted(self.sweep_dir.name)}")
        if job.is_finished and (before := changed_setting(folder, cfg)) is not None:
            job.status = Status.REJECTED
            job.error = f"{folder} was trained with {before}; set another hydra.sweep.dir, or move the folder away"
        elif job.is_finished:
            job.status = Status.FINISHED
        elif cfg.plan.asked:
            job.status = Status.PLANNED
        return job

    def _plan(self, cfg: PretrainConfig) -> Plan:
        """Plan a job for the machine of its plan settings.

        Without such settings, that is the machine that runs it.

        Raises:
            ConfigError: the job can't run there.
        """
        if cfg.plan.device is None and cfg.plan.count is None and cfg.plan.gpus is None:
            return check(cfg, self.world_size(), self.hardware())
        plan = asked_plan(cfg, self.world_size())
        check_memory(plan)
        return plan

    def _run_batch(self, jobs: list[Job]) -> None:
        waiting = [job for job in jobs if job.status is Status.WAITING]
        rejected = [job for job in jobs if job.status is Status.REJECTED]
        for job in rejected:
            print(f"error: {job.labelled_error}", file=sys.stderr, flush=True)
        if rejected and not self.settings.skip_invalid:
            if self.trials:
                self._print_report()  # of earlier batches
            others = ". hydra.launcher.skip_invalid=true starts the others" if len(rejected) < len(jobs) else ""
            rest = f"no job was started{others}"
            print(f"error: {len(rejected)} of {len(jobs)} jobs can't run; {rest}", file=sys.stderr, flush=True)
            sys.exit(USAGE_STATUS)
        finished = sum(job.status is Status.FINISHED for job in jobs)
        print(f"{self.sweep_dir}: {len(jobs)} jobs, {finished} already finished, {len(waiting)} to run", flush=True)
        try:
            self.run(waiting)
        except KeyboardInterrupt:
            print("interrupted; the same command resumes the sweep", file=sys.stderr, flush=True)
            sys.exit(INTERRUPTED_STATUS)
        finally:
            self.record()


def _reject_empty() -> None:
    problem = "the sweep has no job: a glob matches no file of a configuration group"
    raise ConfigError("-m", "multirun", problem, "Correct it, or list the names.")


def _program(config: DictConfig) -> Program:
    runtime, arguments = config.hydra.runtime, ["--config-name", config.hydra.job.config_name]
    for source in runtime.config_sources:
        if source.provider == "command-line":
            arguments += ["--config-dir", source.path]
    return Program(sys.executable, Path(sys.argv[0]).resolve(), Path(runtime.cwd), arguments)


def _swept_settings(context: HydraContext, config: DictConfig) -> list[str]:
    """List the swept settings.

    Those with several values on the command line come first, then the sweeper's.
    """
    parser = OverridesParser.create(config_loader=context.config_loader)
    overrides = parser.parse_overrides(list(config.hydra.overrides.task))
    names = [override.get_key_element() for override in overrides if override.is_sweep_override()]
    params: Any = OmegaConf.select(config, "hydra.sweeper.params") or {}
    return list(dict.fromkeys(setting_and_value(str(name))[0] for name in [*names, *params]))
