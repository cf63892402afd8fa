"""Measures losses, times and memory of a few training steps."""

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.timers import Timers
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from s2train.config import PretrainConfig
from s2train.megatron.block_attention import kernels_of
from s2train.megatron.layer_backends import backend_of
from s2train.megatron.model import build_model, transformer_config
from s2train.planning import hybrid_layout
from s2train.training.optimizer import build_optimizer, gradient_norm, take_step, wrap_data_parallel
from s2train.training.profile import attention_ranges
from s2train.training.profile_table import OPTIMIZER, RANGE, profile_table, read_trace
from s2train.training.steps import run_step


@dataclass(frozen=True)
class ShortRun:
    """Measurements of a few steps.

    Attributes:
        losses: loss of each step, nats per token.
        seconds: time of each step; the first ones include compilation.
        peak_bytes: peak of tensors on the GPU, including model and optimizer.
        kernels: attention kernels, as a run logs them.
        parts: milliseconds of each part of a step; empty if no step was traced.
    """

    losses: list[float]
    seconds: list[float]
    peak_bytes: int
    kernels: list[str]
    parts: dict[str, float]


def run_steps(cfg: PretrainConfig, steps: int, device: torch.device, *, traced: bool = False) -> ShortRun:
    """Train on random tokens from fixed weights.

    Runs of the same shape have the same tokens. Call after `setup.initialize`. Frees its memory.

    Args:
        traced: trace one more step.
    """
    torch.cuda.reset_peak_memory_stats()
    config = transformer_config(cfg)
    try:
        return _run(cfg, config, steps, device, traced)
    finally:
        # A float32 optimizer has views of the model's parameters. Their autograd graph holds Megatron's hooks, which
        # hold the model, which holds the optimizer. Python can't see the graph's link, so cut the last one.
        config.grad_scale_func = None
        free_memory()


def free_memory() -> None:
    """Free models and optimizers that nothing references any longer."""
    gc.collect()  # optimizers
    gc.collect()  # the models that they held
    torch.cuda.empty_cache()


def _run(cfg: PretrainConfig, config: TransformerConfig, steps: int, device: torch.device, traced: bool) -> ShortRun:
    config.timers = Timers(log_level=0, log_option="minmax")
    models = build_model(cfg, config, hybrid_layout(cfg), backend_of(cfg), device)
    _draw_weights(models, cfg)
    chunks = wrap_data_parallel(cfg, config, models)
    optimizer, scheduler = build_optimizer(cfg, config, chunks)
    batches = random_batches(cfg, device)
    losses, seconds = [], []

    def step() -> None:
        started = time.perf_counter()
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        sums = run_step(cfg, chunks, [batches], forward_only=False, batch_size=cfg.train.global_batch_size)
        with record_function(RANGE + OPTIMIZER):
            take_step(optimizer, gradient_norm(optimizer))
        ((total, tokens),) = sums.tolist()
        scheduler.step(increment=cfg.train.global_batch_size)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        losses.append(total / tokens)

    for _ in range(steps):
        step()
    peak, kernels = torch.cuda.max_memory_allocated(), kernels_of(chunks)
    parts: dict[str, float] = {}
    if traced:
        with attention_ranges(models):
            parts = _traced(step)
    return ShortRun(losses[:steps], seconds[:steps], peak, kernels, parts)


def random_batches(cfg: PretrainConfig, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Yield micro batches of random tokens from a separate generator."""
    shape = (cfg.train.micro_batch_size, cfg.train.seq_length)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    while True:
        tokens = torch.randint(cfg.model.vocab_size, shape, device=device, generator=generator)
        yield {
            "tokens": tokens,
            "labels": tokens.roll(-1, dims=1),
            "loss_mask": torch.ones(shape, device=device),
            "position_ids": torch.arange(shape[1], device=device).expand(shape).contiguous(),
        }


def _draw_weights(models: list[torch.nn.Module], cfg: PretrainConfig) -> None:
    """Draw the same weights in every run.

    Megatron's generators would keep their state between runs of a process.
    """
    generator = torch.Generator(next(models[0].parameters()).device).manual_seed(cfg.seed)
    for model in models:
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, cfg.model.init_std, generator=generator)


def _traced(step: Callable[[], None]) -> dict[str, float]:
    """Run two steps, and return milliseconds of each part of the second."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        once = schedule(wait=0, warmup=1, active=1, repeat=1)
        # written when the step ends, since the profiler discards the trace
        with profile(
            activities=activities, schedule=once, on_trace_ready=lambda trace: trace.export_chrome_trace(str(path))
        ) as profiler:
            for _ in range(2):
                step()
                profiler.step()
        return profile_table(read_trace(path)).parts
