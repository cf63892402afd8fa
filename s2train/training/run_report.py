"""Logs what a run starts with, and how it ended."""

from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule

from s2train.attention.hybrid import HybridLayout
from s2train.attention.teacher import teacher_setting
from s2train.checkpoints.resume import Start, describe_start
from s2train.config import PretrainConfig
from s2train.data.blend import parse_blend
from s2train.data.epochs import describe_epochs, training_epochs
from s2train.data.indexed import read_metadata
from s2train.data.tokenizers import Tokenizer
from s2train.environment.hardware_queues import queues
from s2train.environment.liger import kernels_line
from s2train.errors import first_line
from s2train.kernels.attention import Backend as AttentionBackend
from s2train.kernels.attention import resolve_backend
from s2train.megatron.layer_backends import Backend, own_capability
from s2train.megatron.optimizer_state import implementations
from s2train.training.metrics import Tracker
from s2train.training.optimizer import optimizer_options
from s2train.training.records import read_curves
from s2train.training.run_settings import write_settings
from s2train.wandb_run import say


def report_start(cfg: PretrainConfig, start: Start, description: str, last_sample: int, tracker: Tracker) -> None:
    """Write the settings; log description, changes and epochs of the data.

    Args:
        description: from `describe_run`.
        last_sample: the samples that the run will have read at its end.
    """
    step, run_dir = start.progress.step, Path(cfg.run_dir)
    kept = write_settings(cfg, run_dir, step, start.changes)
    say(f"{description}\n{describe_start(cfg, start)}")
    if start.checkpoint is not None:
        tracker.changes(step, start.checkpoint, start.changes)
    if (change := start.held_out) is not None:
        tracker.note(str(change))
        tracker.event("other held-out data", **asdict(change))
    if kept is not None:
        say(f"{run_dir / 'config.yaml'}: the earlier settings are kept as {kept.name}")
    epochs = training_epochs(cfg.data, last_sample, cfg.train.seq_length)
    say("\n".join(describe_epochs(cfg.data, epochs)))
    tracker.event("data", epochs={one.prefix: one.epochs for one in epochs})


def report_end(cfg: PretrainConfig, saved: Path | None, picture: Path | None) -> Path | None:
    """Draw the loss curve, and say where the run ended.

    A curve that can't be drawn is logged, and does not fail the run, whose losses are in metrics.jsonl.

    Args:
        saved: the last checkpoint, if any.
        picture: of the layout, if it was drawn.
    Returns:
        The curve's file; None if it was not drawn.
    """
    train, run_dir, baseline = cfg.train, Path(cfg.run_dir), _unigram_baseline(cfg)
    metrics, curve = run_dir / "metrics.jsonl", run_dir / "loss.png"
    drawn: Path | None = curve
    try:
        from s2train.training.plots import draw_loss_curve  # matplotlib: slow, and the start needs no curve

        draw_loss_curve(metrics, curve, baseline, title=cfg.model.name)
    except Exception as error:  # a broken matplotlib, a full disk
        say(f"the loss curve can't be drawn: {first_line(error)}")
        drawn = None
    if baseline is not None:
        say(f"unigram entropy of the data: {baseline:.4f} nats per token, the best loss without any context")
    begins_after = read_curves(metrics).begins_after
    covered = f" from step {begins_after + 1}" if drawn and begins_after else ""
    say(
        f"{'finished' if train.last_step == train.steps else 'stopped'} at step {train.last_step} of {train.steps}"
        f" | checkpoint {saved or 'none'} | loss curve {drawn or 'none'}{covered}"
        + (f" | layout {picture}" if picture else "")
    )
    return drawn


def describe_run(
    cfg: PretrainConfig,
    hybrid: HybridLayout,
    models: list[MegatronModule],
    optimizer: MegatronOptimizer,
    backend: Backend,
    tokenizer: Tokenizer,
    device: torch.device,
) -> str:
    """Describe this rank's part of a run, and its layers' teacher."""
    here = sum(parameter.numel() for model in models for parameter in model.parameters())
    elementwise = kernels_line(cfg, own_capability(), backend.name == "te")
    is_dense = all(layer.is_dense for layer in hybrid.layers)
    sparse = resolve_backend(cast(AttentionBackend, cfg.attention_backend), device)
    return (
        f"{here:,} parameters on this rank | layers {backend.name} on {device.type}"
        + ("" if is_dense else f" | sparse attention {sparse}")
        + (f" | {elementwise}" if elementwise else "")
        + (f" | {limit}" if (limit := queues()) else "")
        + f" | optimizer {cfg.optim.name}: {implementations(optimizer)}"
        + "".join(f", {name}={value}" for name, value in optimizer_options(cfg).items())
        + f" | dp {parallel_state.get_data_parallel_world_size()}"
        f" | end of document {tokenizer.end_token or 'id'} {tokenizer.eod}" + _taught_by(hybrid)
    )


def _taught_by(hybrid: HybridLayout) -> str:
    if (found := teacher_setting(hybrid.layers)) is None:
        return ""
    letters = sorted({layer.kind.letter for layer in hybrid.layers if layer.kind.teacher is not None})
    return f"\nteacher of layers {', '.join(letters)}: the dense model of {found.value}, which stays as it is"


def _unigram_baseline(cfg: PretrainConfig) -> float | None:
    """Return the unigram entropy of the data in nats per token.

    It is None unless the data are one dataset that `prepare_data` made.
    """
    prefixes = parse_blend(cfg.data.path).prefixes
    metadata = read_metadata(prefixes[0]) if len(prefixes) == 1 else None
    return metadata.unigram_entropy if metadata else None
