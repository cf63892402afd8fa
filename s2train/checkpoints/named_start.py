"""Checks where a run would start, if that depends on a checkpoint.

Imports Megatron only then.
"""

from s2train.attention.teacher import teacher_setting
from s2train.checkpoints.listing import checkpoints_of
from s2train.config import PretrainConfig
from s2train.environment.imports import quick_imports
from s2train.planning import hybrid_layout


def named_start(cfg: PretrainConfig) -> str | None:
    """Format where a run would start; None if no checkpoint is involved.

    Raises:
        ConfigError: the run would reject its checkpoint or its teacher.
    """
    if not _names_checkpoint(cfg):
        return None
    with quick_imports():
        from s2train.megatron.lazy_imports import import_megatron

        import_megatron()
        from s2train.checkpoints.planned_start import planned_start
    return planned_start(cfg)


def _names_checkpoint(cfg: PretrainConfig) -> bool:
    """Whether settings name a checkpoint, or the run folder holds one."""
    is_named = cfg.checkpoint.resume not in ("auto", "never") or cfg.checkpoint.new_data
    has_teacher = teacher_setting(hybrid_layout(cfg).layers) is not None
    return is_named or has_teacher or bool(checkpoints_of(cfg.run_dir))
