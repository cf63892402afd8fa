"""Checks an evaluation's settings before it uses a device."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from s2train.checkpoints.trained import Trained
from s2train.config import PretrainConfig
from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.files import check_writable
from s2train.needles.config import NeedleConfig
from s2train.needles.results import output_folder
from s2train.needles.retrieval import NeedleGrid, check_fit, choose_grid
from s2train.needles.samples import TaskSampler
from s2train.needles.tasks import TASKS, Task, find_task, has_setting
from s2train.needles.words import NOISE, text_haystack
from s2train.planning.checks import check_attention_backend
from s2train.validation.division import check_whole_models
from s2train.validation.values import check_seed
from s2train.wandb_run import choose_mode

_TASK_SETTINGS = ("needles", "ask", "distractors", "hops", "chains")


@dataclass(frozen=True)
class Problem:
    """One task to evaluate on a grid.

    Attributes:
        settings: settings of the task, by name.
    """

    name: str
    settings: dict[str, Any]
    sampler: TaskSampler
    grid: NeedleGrid


@dataclass(frozen=True)
class Request:
    """A checked needle evaluation.

    Attributes:
        checkpoint: the iter_* folder.
        trained: settings of the run that wrote it.
        folder: folder for the results.
        haystack_fingerprint: fingerprint of the haystack's text, since a file may change under its name.
    """

    checkpoint: Path
    trained: PretrainConfig
    problems: tuple[Problem, ...]
    folder: Path
    haystack_fingerprint: str


def read_request(cfg: NeedleConfig, world_size: int, hardware: Hardware) -> Request:
    """Read and check an evaluation's settings and files, without writing anything.

    Args:
        world_size: processes of the job.
        hardware: device of a process.
    Raises:
        ConfigError: a setting can't work, a file is missing, or the output can't be written.
    """
    check_seed(cfg.seed)
    check_attention_backend(cfg.attention_backend, hardware)
    if cfg.batch_size < 1:
        raise ConfigError("batch_size", cfg.batch_size, "a batch needs a sequence", "Use 1 or more")
    if cfg.batch_tokens is not None and cfg.batch_tokens < 1:
        raise ConfigError("batch_tokens", cfg.batch_tokens, "a batch needs a token", "Use 1 or more, or null")
    if cfg.extra_tokens < 0:
        raise ConfigError("extra_tokens", cfg.extra_tokens, "is negative", "Use 0 or more")
    if not 0 < cfg.threshold <= 1:
        raise ConfigError("threshold", cfg.threshold, "is not a share of answers", "Use more than 0 and up to 1")
    choose_mode(cfg.wandb, "wandb")  # reject a bad mode now
    tasks = _tasks(cfg)
    haystack = _haystack(cfg.haystack)
    trained = Trained.find(cfg.checkpoint)
    check_whole_models(cfg.tp, world_size)
    trained.check_decoding(cfg.tp)
    tokenizer = trained.tokenizer(cfg.tokenizer)
    longest = max(cfg.lengths or [trained.config.train.seq_length])
    remedy = ", or extra_tokens=0" if cfg.extra_tokens else ""
    trained.check_length(longest + cfg.extra_tokens, "lengths", longest, remedy)  # before texts of that length are made
    problems = []
    for name, task in tasks.items():
        sampler = TaskSampler(tokenizer, haystack, task)
        grid = choose_grid(cfg, trained.config.train.seq_length, sampler)
        check_fit(sampler, grid)
        problems.append(Problem(name, asdict(task), sampler, grid))  # type: ignore[call-overload]
    folder = output_folder(cfg)
    check_writable("output", folder if cfg.output is None else cfg.output)  # cfg.output as given, since Path("") is "."
    haystack_fingerprint = hashlib.sha256(haystack.encode()).hexdigest()[:16]
    return Request(trained.checkpoint, trained.config, tuple(problems), folder, haystack_fingerprint)


def _tasks(cfg: NeedleConfig) -> dict[str, Task]:
    """Requested tasks by name.

    Each given setting must belong to one of them.
    """
    names = [cfg.task] if isinstance(cfg.task, str) else cfg.task
    if not isinstance(names, list) or not names or len(set(map(str, names))) < len(names):
        problem = "names no task, or one task twice"
        raise ConfigError("task", cfg.task, problem, f"Set one or a list of {', '.join(TASKS)}")
    given = {name: getattr(cfg, name) for name in _TASK_SETTINGS}
    own = {str(name): {key: given[key] for key in given if has_setting(str(name), key)} for name in names}
    unused = {key: value for key, value in given.items() if not any(key in settings for settings in own.values())}
    return {name: find_task(name, settings | unused) for name, settings in own.items()}


def _haystack(given: Any) -> str:
    if given == "noise":
        return NOISE
    files = [given] if isinstance(given, str) else given
    if not isinstance(files, list) or not files or not all(isinstance(file, str) and file for file in files):
        raise ConfigError("haystack", given, "names no text", "Set noise, a text file, or [file, …]")
    return text_haystack([Path(file) for file in files])
