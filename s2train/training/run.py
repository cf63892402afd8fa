"""A pretraining run from its configuration to its last checkpoint."""

import os
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.timers import Timers
from megatron.core.transformer.module import MegatronModule

from s2train.config import PretrainConfig


from s2train.data.checks import check_data, num_train_samples
from s2train.data.datasets import build_datasets, ensure_prepared
from s2train.data.tokenizers import Tokenizer, load_tokenizer
from s2train.hardware import Hardware, detect
from s2train.kernels.attention import resolve_backend
from s2train.layouts.hybrid import HybridLayout, build_hybrid_layout
from s2train.layouts.pictures import draw_layer_head_grid
from s2train.megatron import setup
from s2train.megatron.backends import Backend, choose_backend
from s2train.megatron.model import build_model, transformer_config
from s2train.planning import check, format_plan, make_plan
from s2train.planning.flops import token_flops
from s2train.training import checkpoint
from s2train.training.checkpoint import TrainingState
from s2train.training.loop import Speed, Trainer
from s2train.training.metrics import Tracker
from s2train.training.optimizer import build_optimizer, wrap_data_parallel
from s2train.training.plots import draw_loss_curve
from s2train.training.resume import check_resume, find_start


def pretrain(cfg: PretrainConfig) -> None:
    """Plan, check, build, train, save. What can be refused is refused before a process group or a tensor is made.

    Raises:
        ConfigError: a setting that can't work.
    """
    world_size, is_first = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0") == "0"
    hardware = detect(int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if cfg.plan:
        if is_first:
            print(format_plan(make_plan(cfg, model_layout(cfg), world_size, hardware)))
        return
    check(cfg, world_size, hardware)
    hybrid, backend, tokenizer = model_layout(cfg), choose_backend(cfg.backend), load_tokenizer(cfg.data.tokenizer)
    plan = format_plan(make_plan(cfg, hybrid, world_size, hardware))
    if is_first:  # the others wait for it at the process group
        ensure_prepared(cfg)
        check_data(cfg, tokenizer)
        check_resume(cfg)
        print(plan, flush=True)
    device = setup.initialize(cfg.parallel, cfg.seed)
    try:
        _train(cfg, hybrid, backend, tokenizer, hardware, device)
    finally:
        setup.shutdown()


def model_layout(cfg: PretrainConfig) -> HybridLayout:
    """The layers of the configured model."""
    model = cfg.model
    return build_hybrid_layout(
        cfg.layout,
        cfg.schedule,
        num_layers=model.num_layers,
        num_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
    )


def _train(
    cfg: PretrainConfig,
    hybrid: HybridLayout,
    backend: Backend,
    tokenizer: Tokenizer,
    hardware: Hardware,
    device: torch.device,
) -> None:
    is_first = torch.distributed.get_rank() == 0
    run_dir = Path(cfg.run_dir)
    found = find_start(cfg)
    torch.distributed.barrier()  # all have looked before the folder changes

    config = transformer_config(cfg)
    timers = Timers(log_level=cfg.tracking.timing, log_option="minmax")
    config.timers = timers if cfg.tracking.timing else None
    models = build_model(cfg, config, hybrid, backend, device)
    chunks = wrap_data_parallel(cfg, config, models)
    optimizer, scheduler = build_optimizer(cfg, config, chunks)
    state = TrainingState(chunks, optimizer, scheduler)
    start = checkpoint.load(cfg, state, found) if found else 0

    held_out_samples = cfg.evaluation.batches * cfg.train.global_batch_size if cfg.evaluation.interval else 0
    train_set, held_out_set = build_datasets(
        cfg, tokenizer, num_train_samples(cfg), held_out_samples, is_built_on_rank=lambda: True
    )
    tracker = Tracker(cfg, active=is_first, start=start, wandb_id=state.wandb_id)
    if is_first:
        checkpoint.write_config(cfg, run_dir / "config.yaml")
        draw_layer_head_grid(hybrid, cfg.train.seq_length, run_dir / "layout.png")
        print(_description(cfg, models, backend, device, found), flush=True)
    tracker.picture("layout", run_dir / "layout.png")
    trainer = Trainer(
        cfg,
        state,
        train_set,
        held_out_set,
        tracker,
        timers,
        Speed(
            flops_per_token=token_flops(cfg.model, hybrid, cfg.train.seq_length).sparse,
            peak_flops=hardware.peak_flops(cfg.train.precision),
            devices=torch.distributed.get_world_size(),
        ),
        device,
    )
    stopped = trainer.train(start)
    if is_first:
        draw_loss_curve(run_dir / "metrics.jsonl", run_dir / "loss.png", title=cfg.model.name)
        finished = stopped >= cfg.train.steps
        print(
            f"{'finished' if finished else 'stopped'} at step {stopped} of {cfg.train.steps}"
            f" | checkpoint {checkpoint.find_checkpoint(run_dir)}"
            f" | loss curve {run_dir / 'loss.png'} | layout {run_dir / 'layout.png'}",
            flush=True,
        )
    tracker.picture("loss curve", run_dir / "loss.png")
    tracker.close()


def _description(
    cfg: PretrainConfig, models: list[MegatronModule], backend: Backend, device: torch.device, found: Path | None
) -> str:
    here = sum(parameter.numel() for model in models for parameter in model.parameters())
    sparse = resolve_backend(cfg.attention_backend, device)
    return (
        f"{here:,} parameters on this rank | layers {backend.name} | sparse attention {sparse} on {device.type}"
        f" | optimizer {backend.optimizer}"
        f" | dp {parallel_state.get_data_parallel_world_size()}\n"
        + (f"resuming from {found}" if found else f"new run in {cfg.run_dir}")
    )
