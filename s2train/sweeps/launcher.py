"""What Hydra's sweepers hand their jobs to: `python launch/pretrain.py -m …`.

All jobs are composed and judged before the first starts. Each lives in a folder of its own under `hydra.sweep.dir`,
named by its overrides, so that the same command again skips what is finished and goes on with the rest. Another sweep
into the same folder adds its jobs to the table.
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

from s2train.command_line.overrides import quoted
from s2train.command_line.program import run_command
from s2train.config import PretrainConfig, SweepConfig
from s2train.environment.hardware import Hardware
from s2train.errors import INTERRUPTED_STATUS, USAGE_STATUS, ConfigError
from s2train.planning import Plan, check, check_memory, planned_for, preview, resolve
from s2train.sweeps.jobs import Job, Status, changed_setting, read_record, told_apart, write_record
from s2train.sweeps.names import job_folder, label, setting_and_value


@dataclass(frozen=True)
class Program:
    """What every job runs.

    Attributes:
        arguments: which Hydra config, where not the program's own.
    """

    python: str
    path: Path
    cwd: Path
    arguments: list[str]


class SweepLauncher(Launcher):
    """Judges jobs, skips finished ones, has the rest run, and tells the sweeper their losses."""

    settings: SweepConfig

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's; refuses settings of the sweep itself."""
        self.context, self.config = hydra_context, config
        self.sweep_dir = Path(config.hydra.runtime.cwd, config.hydra.sweep.dir)
        self.program = _program(config)
        self.swept = _swept_settings(hydra_context, config)
        self.jobs: dict[Path, Job] = {}
        self.trials = 0  # proposals so far, repeated ones too
        self.earlier = [
            replace(job, is_earlier=True) for job in read_record(self.sweep_dir) if job.summary() is not None
        ]
        run_command(self._check_sweep)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Hydra's: run one batch of jobs.

        A job without a loss returns None as COMPLETED: at a FAILED one Hydra's own sweeper would end the sweep.
        """
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
        """Raise ConfigError if jobs can't be started here as asked."""

    @abstractmethod
    def hardware(self) -> Hardware:
        """The device of one process of a job."""

    @abstractmethod
    def world_size(self) -> int:
        """Processes of a job."""

    @abstractmethod
    def run(self, jobs: list[Job]) -> None:
        """Run judged jobs, none of them finished, and set their status."""

    def record(self) -> None:
        """Keep what is known of all jobs so far, and of those that an earlier sweep ran in this folder."""
        jobs = list(self.jobs.values())
        known = {job.folder.name for job in jobs}
        earlier = [job for job in self.earlier if job.folder.name not in known]
        write_record(self.sweep_dir, told_apart([*earlier, *jobs]) if earlier else jobs)

    def _end_without_losses(self) -> None:
        """End the sweep if no trial has a loss: optuna's sweeper would look for the best one, and raise."""
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
            remedy = "Sweep by `python launch/pretrain.py -m …`, with hydra.launcher.nproc_per_node=N"
            raise ConfigError("-m", "multirun", "a sweep starts one torchrun for each job and is none itself", remedy)
        for name in ("nproc_per_node", "n_jobs", "nodes"):
            value = getattr(self.settings, name, 1)
            if value < 1:
                raise ConfigError(f"hydra.launcher.{name}", value, "must be more than 0", f"Set {name} to 1 or more")
        for override in self.config.hydra.overrides.task:
            if setting_and_value(override)[0] == "run_dir":
                raise ConfigError("run_dir", "…", "each job has a folder of its own", "Set hydra.sweep.dir=FOLDER")
        self.check_settings()

    def _prepare(self, overrides: Sequence[str]) -> Job:
        """The job of some overrides, composed and judged."""
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
            cfg = resolve(composed, loader.get_group_options("model"))
            plan = self._plan(cfg)
        except (ConfigError, HydraException, OmegaConfBaseException) as error:
            job.status, job.error = Status.REFUSED, str(error).splitlines()[0]
            return job
        job.layers, job.density, job.last_step = plan.letters, plan.density, cfg.train.last_step
        if cfg.tracking.group is None:
            job.arguments.append(f"tracking.group={quoted(self.sweep_dir.name)}")
        if job.is_finished and (before := changed_setting(folder, cfg)) is not None:
            job.status = Status.REFUSED
            job.error = f"{folder} was trained with {before}; name another hydra.sweep.dir, or move it away"
        elif job.is_finished:
            job.status = Status.FINISHED
        elif cfg.plan.asked:
            job.status = Status.PLANNED
        return job

    def _plan(self, cfg: PretrainConfig) -> Plan:
        """Of a job on the machine that runs it, or on the one that it is to be planned for; raises as `check`."""
        if cfg.plan.device is None and cfg.plan.count is None:
            return check(cfg, self.world_size(), self.hardware())
        plan = preview(cfg, *planned_for(cfg, self.world_size()))
        check_memory(plan)
        return plan

    def _run_batch(self, jobs: list[Job]) -> None:
        waiting = [job for job in jobs if job.status is Status.WAITING]
        refused = [job for job in jobs if job.status is Status.REFUSED]
        for job in refused:
            print(f"error: {job.label}: {job.error}", file=sys.stderr, flush=True)
        if refused and not self.settings.skip_invalid:
            if self.trials:
                self._print_report()  # of earlier batches
            others = ". hydra.launcher.skip_invalid=true starts the others" if len(refused) < len(jobs) else ""
            rest = f"none of them was started{others}"
            print(f"error: {len(refused)} of {len(jobs)} jobs can't run; {rest}", file=sys.stderr, flush=True)
            sys.exit(USAGE_STATUS)
        finished = sum(job.status is Status.FINISHED for job in jobs)
        print(f"{self.sweep_dir}: {len(jobs)} jobs, {finished} finished before, {len(waiting)} to run", flush=True)
        try:
            self.run(waiting)
        except KeyboardInterrupt:
            print("interrupted; the same command resumes the sweep", file=sys.stderr, flush=True)
            sys.exit(INTERRUPTED_STATUS)
        finally:
            self.record()


def _program(config: DictConfig) -> Program:
    runtime, arguments = config.hydra.runtime, ["--config-name", config.hydra.job.config_name]
    for source in runtime.config_sources:
        if source.provider == "command-line":
            arguments += ["--config-dir", source.path]
    return Program(sys.executable, Path(sys.argv[0]).resolve(), Path(runtime.cwd), arguments)


def _swept_settings(context: HydraContext, config: DictConfig) -> list[str]:
    """Settings with more than one value: those given so on the command line, then those of the sweeper."""
    parser = OverridesParser.create(config_loader=context.config_loader)
    overrides = parser.parse_overrides(list(config.hydra.overrides.task))
    names = [override.get_key_element() for override in overrides if override.is_sweep_override()]
    params: Any = OmegaConf.select(config, "hydra.sweeper.params") or {}
    return list(dict.fromkeys(setting_and_value(str(name))[0] for name in [*names, *params]))
