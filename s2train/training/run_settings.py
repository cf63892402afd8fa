"""Writes `config.yaml` of a run folder, and keeps its earlier versions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from s2train.checkpoints.folders import write_config, written_settings
from s2train.checkpoints.setting_changes import Change
from s2train.config import PretrainConfig
from s2train.files import replacing, set_aside


def write_settings(cfg: PretrainConfig, run_dir: Path, step: int, changes: Sequence[Change]) -> Path | None:
    """Write `config.yaml`, and keep an earlier one with other settings.

    Earlier files are renamed to `config.1.yaml`, `config.2.yaml`, …. Comments at the head of the new file list the
    changes, one line for each resume that changed settings.

    Args:
        step: step after which the run resumes; 0 for a new run.
        changes: differences from the settings of the checkpoint.
    Returns:
        Path of the earlier settings; None if there are none or they are the same.
    """
    path = run_dir / "config.yaml"
    if not path.exists():
        write_config(cfg, path)
        return None
    if _read(path) == written_settings(cfg):
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    history = [line for line in lines if line.startswith("#")] if step else []
    kept = set_aside(path)
    assert kept is not None
    what = ", ".join(map(str, changes)) if step else "a new run"
    history.append(f"# from step {step + 1} on: {what or 'the same settings in another notation'}; before: {kept.name}")
    with replacing(path) as temporary:
        write_config(cfg, temporary)
        temporary.write_text("\n".join([*history, temporary.read_text()]))
    return kept


def _read(path: Path) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except (ValueError, YAMLError, OmegaConfBaseException):  # an earlier run was killed while it wrote the file
        return None
