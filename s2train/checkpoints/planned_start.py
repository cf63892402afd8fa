"""Checks where a planned run would start."""

from s2train.attention.teacher import teacher_setting
from s2train.checkpoints.resume import describe_start, find_start
from s2train.checkpoints.teacher import find_teacher, with_teacher
from s2train.config import PretrainConfig
from s2train.data.end_token import run_tokenizer
from s2train.planning import hybrid_layout


def planned_start(cfg: PretrainConfig) -> str:
    """Format where a run would start, checked as the run does.

    Only reads files. A run's data may be missing when it is planned; their order is then not compared.

    Raises:
        ConfigError: the run would reject its checkpoint or its teacher.
    """
    teacher = None
    if teacher_setting(hybrid_layout(cfg).layers) is not None:
        cfg, tokenizer = run_tokenizer(cfg)
        teacher = find_teacher(cfg, tokenizer)
    try:
        start = find_start(with_teacher(cfg, teacher))
    except FileNotFoundError as error:  # what is missing of a checkpoint is a ConfigError
        return f"{'start':<13} the data's order is not compared with a checkpoint's: {error.filename} is missing"
    lines = [describe_start(cfg, start)]
    if (done := start.progress.step) >= cfg.train.last_step:
        lines.append(f"nothing to do: it is at step {done} of {cfg.train.steps}")
    lines += [f"changed: {change}" for change in start.changes if not change.setting.startswith("plan.")]
    if start.held_out is not None:
        lines.append(str(start.held_out))
    return "\n".join(f"{'' if number else 'start':<13} {line}" for number, line in enumerate(lines))
