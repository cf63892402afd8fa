"""Checks what to profile before a device is used."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.files import check_output
from s2train.kernels.layout import BLOCK_SIZES
from s2train.needles.results import weights_fingerprint
from s2train.semsa.calibration import Labels, Subject, read_subject
from s2train.semsa.config import ProfileAttentionConfig
from s2train.semsa.profile import check_same_model, load_profile, ranked_columns
from s2train.semsa.rules import Rule, make_library

_UNFINISHED = ".unfinished.npz"


@dataclass(frozen=True)
class Request:
    """Checked settings."""

    subject: Subject
    labels: Labels
    block_size: int
    rules: tuple[Rule, ...]
    columns: np.ndarray | None
    output: Path
    unfinished: Path


def read_request(cfg: ProfileAttentionConfig, world_size: int, hardware: Hardware) -> Request:
    """Check the settings; builds no model.

    Raises:
        ConfigError: a setting can't work, a file is missing, or the checkpoint isn't dense.
    """
    for name, least in (("samples", 1), ("save_interval", 1), ("verify", 0), ("verify_samples", 1)):
        if getattr(cfg, name) < least:
            raise ConfigError(name, getattr(cfg, name), "too small", f"Set {name}={least} or more.")
    if cfg.labels not in ("sampled", "data"):
        raise ConfigError("labels", cfg.labels, "unknown", "Set labels=sampled or labels=data.")
    if not 0 < cfg.temperature < float("inf"):
        raise ConfigError("temperature", cfg.temperature, "must be above 0 and finite", "Set temperature=4.")
    if cfg.precision not in (None, "bf16", "fp32"):
        raise ConfigError("precision", cfg.precision, "unknown", "Set precision=bf16 or precision=fp32.")
    if Path(cfg.output).suffix != ".npz":
        raise ConfigError("output", cfg.output, "is no .npz file", "Name one, such as runs/semsa/profile.npz.")
    lacks_verification = cfg.verify > 0 and not verification_file(Path(cfg.output)).exists()
    output = check_output(cfg.output, cfg.overwrite or lacks_verification, such="runs/semsa/profile.npz")
    if cfg.verify and not lacks_verification and not cfg.overwrite:
        problem = f"{verification_file(output)} exists"
        raise ConfigError("verify", cfg.verify, problem, "Add overwrite=true, or set another output.")
    subject = read_subject(
        cfg.checkpoint, cfg.data, seq_length=cfg.seq_length, held_out=False, tp=cfg.tp, seed=cfg.seed,
        attention_backend=cfg.attention_backend, world_size=world_size, hardware=hardware,
    )  # fmt: skip
    ranks = world_size // cfg.tp
    if cfg.samples % ranks:
        problem = f"{ranks} data parallel ranks can't share them evenly"
        raise ConfigError("samples", cfg.samples, problem, f"Set a multiple of {ranks}.")
    block_size = subject.trained.layout.block_size if cfg.block_size is None else cfg.block_size
    if block_size not in BLOCK_SIZES:
        raise ConfigError("block_size", block_size, "not supported", f"Set one of {', '.join(map(str, BLOCK_SIZES))}.")
    if subject.cfg.train.seq_length < 2 * block_size:
        problem = f"sequences of {subject.cfg.train.seq_length} tokens have no two of these blocks"
        raise ConfigError("block_size", block_size, problem, "Set a smaller one.")
    rules = make_library(cfg.library)
    columns = _read_columns(cfg, rules, subject, block_size)
    unfinished = output.with_suffix(_UNFINISHED)
    labels = Labels(cfg.labels, cfg.temperature if cfg.labels == "sampled" else 1.0)
    return Request(subject, labels, block_size, rules, columns, output, unfinished)


def _read_columns(
    cfg: ProfileAttentionConfig, rules: tuple[Rule, ...], subject: Subject, block_size: int
) -> np.ndarray | None:
    takes = any(rule.takes_columns for rule in rules)
    if cfg.columns_from is None:
        if takes:
            problem = "no profile says which columns matter"
            remedy = "Set columns_from to a profile of this checkpoint, made without such rules."
            raise ConfigError("library.columns", cfg.library.columns, problem, remedy)
        return None
    if not takes:
        raise ConfigError("columns_from", cfg.columns_from, "no rule has columns", "Set library.columns=[[4,8]].")
    earlier = load_profile(cfg.columns_from, "columns_from")
    weights = weights_fingerprint(subject.checkpoint)
    check_same_model(earlier, weights, cfg.columns_from, subject.checkpoint, "columns_from")
    length = subject.cfg.train.seq_length
    if earlier.block_size != block_size or earlier.seq_length < length:
        problem = f"it has blocks of {earlier.block_size} and {earlier.seq_length:,} tokens"
        remedy = f"Profile with block_size={block_size} and {length:,} tokens first."
        raise ConfigError("columns_from", cfg.columns_from, problem, remedy)
    blocks = -(-length // block_size)
    local = min(rule.settings["local"] for rule in rules if rule.takes_columns)
    return ranked_columns(earlier.blocks[..., :blocks, :blocks], subject.trained.model.num_query_groups, local)


def verification_file(output: Path) -> Path:
    """Return where the comparison with real masks is written."""
    return output.with_name(f"{output.stem}-verify.json")
