"""Finds tasks of lm-evaluation-harness, and evaluates a model on them."""

import difflib
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2train.data.tokenizers import Tokenizer
from s2train.errors import ConfigError
from s2train.evaluation.config import EvaluateConfig
from s2train.evaluation.generation_settings import tokens_to_generate
from s2train.evaluation.scoring import Scorer


def load_tasks(cfg: EvaluateConfig, length: int) -> Any:
    """Load the tasks of `cfg.tasks`, with their data.

    Args:
        length: tokens that the model sees at once.
    Returns:
        the harness's tasks; None if there are none.
    Raises:
        ConfigError: the harness is not installed, a task is unknown, its data can't be loaded, it has fewer examples
            than are asked for, or it generates text in a way that is not supported.
    """
    if not cfg.tasks:
        return None
    if importlib.util.find_spec("lm_eval") is None:
        problem = "lm-evaluation-harness is not installed"
        raise ConfigError("tasks", _list(cfg.tasks), problem, "pip install -e '.[eval]'")
    if cfg.task_folder is not None and not Path(cfg.task_folder).is_dir():
        raise ConfigError("task_folder", cfg.task_folder, "no such folder", "Set a folder of tasks' YAML files")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager  # slow: reads thousands of files

    manager = TaskManager(include_path=cfg.task_folder)
    known = manager.all_tasks
    for name in cfg.tasks:
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))
            raise ConfigError("tasks", name, "no such task", f"Did you mean {near}? Your own: task_folder=FOLDER")
    try:
        loaded = manager.load(list(cfg.tasks))
    except Exception as error:  # of the harness, of `datasets`, or of the network
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        problem = f"the tasks or their data can't be loaded ({reason})"
        raise ConfigError("tasks", _list(cfg.tasks), problem, "Check the network, or the task's file") from error
    for name, task in loaded["tasks"].items():
        _check_examples(name, task, cfg.fewshot)
        if task.OUTPUT_TYPE == "generate_until":
            tokens_to_generate(name, task.config.generation_kwargs or {}, length)
    return loaded


def _check_examples(name: str, task: Any, fewshot: int | None) -> None:
    """Check that a task has the examples that stand before its questions.

    The harness would ignore `fewshot` for a task that sets 0 itself, and end with a stack where examples are too few.
    """
    own = task.config.num_fewshot
    if fewshot and own == 0:
        problem = f"the task {name} takes no examples (num_fewshot: 0 in its file)"
        raise ConfigError("fewshot", fewshot, problem, "Leave fewshot out, or evaluate the other tasks by themselves")
    if not (count := (own or 0) if fewshot is None else fewshot):
        return
    # A question is no example for itself.
    is_tested = task.config.test_split is not None and task.fewshot_cfg.split == task.config.test_split
    there = len(list(task.fewshot_docs())) - is_tested
    if count > there:
        problem = f"the task {name} would take {count} examples, and has {there}"
        raise ConfigError("fewshot", fewshot, problem, f"Set fewshot={there} or less")


def run_tasks(cfg: EvaluateConfig, tasks: Any, scorer: Scorer, tokenizer: Tokenizer, length: int) -> dict[str, Any]:
    """Evaluate a model on loaded tasks; collective over its tensor parallel ranks.

    Returns:
        the harness's results by task, with versions and numbers of examples and questions; on other ranks than the
        first, nothing.
    """
    from lm_eval import simple_evaluate

    from s2train.evaluation.harness import CachedLM

    found: Any = simple_evaluate(
        CachedLM(scorer, tokenizer, length, cfg.batch_size, cfg.seed),
        tasks=_outermost(tasks),
        num_fewshot=cfg.fewshot,
        limit=cfg.limit,
        log_samples=False,
        random_seed=cfg.seed,
        numpy_random_seed=cfg.seed,
        torch_random_seed=cfg.seed,
        fewshot_random_seed=cfg.seed,
    )
    if found is None:
        return {}
    return {name: found.get(name, {}) for name in ("results", "groups", "versions", "n-shot", "n-samples")}


def _outermost(tasks: Any) -> list[Any]:
    """List the groups and tasks that belong to no group.

    A group's score sums up those of its members.
    """
    inner = {child for children in tasks["group_map"].values() for child in children}
    return [item for part in ("groups", "tasks") for name, item in tasks[part].items() if name not in inner]


def metrics(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the numbers of the harness's results, by task and by metric."""
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in found.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "sample_len"
        }
        for task, found in (results.get("results") or {}).items()
    }


def _list(names: Sequence[str]) -> str:
    return f"[{','.join(names)}]"
