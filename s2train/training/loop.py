"""The training loop."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from megatron.core.timers import Timers
from torch.profiler import record_function
from torch.utils.data import Dataset

from s2train.config import PretrainConfig
from s2train.errors import TrainingError
from s2train.megatron.checkpoint import Progress
from s2train.megatron.core_attention import kernels_of
from s2train.training.batches import Batch, micro_batches
from s2train.training.breakdown import OPTIMIZER, RANGE
from s2train.training.checkpoint import TrainingState, save
from s2train.training.metrics import StepMetrics, Tracker
from s2train.training.optimizer import whole_parameters
from s2train.training.peak import PEAK_STEPS, report_peak
from s2train.training.profile import StepProfiler
from s2train.training.steps import run_step


@dataclass(frozen=True)
class Speed:
    """What turns step times into rates.

    Attributes:
        flops_per_token: training FLOPs of the model, exact for its layout.
        peak_flops: FLOP/s of a device, None where not known.
        devices: ranks of the job.
        planned_memory: bytes that the plan foretells torch will hold on the fullest rank.
    """

    flops_per_token: float
    peak_flops: float | None
    devices: int
    planned_memory: int


@dataclass
class Interval:
    """Sums since the last report."""

    losses: list[float] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    paused: float = 0.0  # seconds spent evaluating and saving, which are not the step's


class Trainer:
    """Runs steps, evaluates, reports and saves."""

    def __init__(
        self,
        cfg: PretrainConfig,
        state: TrainingState,
        train_set: Dataset,
        held_out_set: Dataset | None,
        tracker: Tracker,
        timers: Timers,
        speed: Speed,
        device: torch.device,
    ) -> None:
        self.cfg, self.state, self.tracker, self.speed, self.device = cfg, state, tracker, speed, device
        self.train_set, self.held_out_set, self.timers = train_set, held_out_set, timers

    def train(self, progress: Progress) -> Path:
        """Train on from `progress` to the last step; returns the checkpoint saved there.

        Raises:
            TrainingError: the loss or the gradient is not finite; the step is not saved.
        """
        cfg, size = self.cfg, self.cfg.train.global_batch_size
        last = cfg.train.last_step
        consumed = progress.consumed_samples
        batches = self._batches(self.train_set, consumed, consumed + (last - progress.step) * size)
        interval, profiler = Interval(), StepProfiler(cfg, self.state.chunks, self.tracker.note)
        for step in range(progress.step + 1, last + 1):
            with profiler.step(step):
                loss, grad_norm, lr = self._step(batches)
            interval.paused += profiler.pause_s()
            consumed += size
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise TrainingError(
                    f"step {step}: loss {loss}, gradient norm {grad_norm}. Not saved; go on from an earlier checkpoint"
                    " in another run_dir, with a lower optim.lr or optim.clip_grad"
                )
            interval.losses.append(loss)
            if step == progress.step + 1:
                for kernels in kernels_of(self.state.chunks):
                    self.tracker.note(f"sparse attention: {kernels}")
            is_last = step == last
            if step == min(progress.step + PEAK_STEPS, last):
                report_peak(self.speed.planned_memory, self.tracker)
            held_out = None
            paused = time.perf_counter()
            if self.held_out_set is not None and (step % cfg.evaluation.interval == 0 or is_last):
                held_out = self.held_out_loss()
            interval.paused += time.perf_counter() - paused
            if step % cfg.tracking.log_interval == 0 or held_out is not None or is_last:
                self.tracker.report(self._metrics(step, last, interval, grad_norm, lr, held_out))
                if cfg.tracking.timing:
                    self.tracker.note(self.timers.get_all_timers_string(normalizer=len(interval.losses)))
                interval = Interval()
            if step % cfg.checkpoint.interval == 0 or is_last:
                paused = time.perf_counter()
                saved = self._save(replace(progress, step=step, consumed_samples=consumed))
                interval.paused += time.perf_counter() - paused
        return saved

    def held_out_loss(self) -> float:
        """Mean loss (nats per token) over the first `evaluation.batches` global batches of the held-out split."""
        cfg, chunks = self.cfg, self.state.chunks
        assert self.held_out_set is not None
        count = cfg.evaluation.batches
        batches = self._batches(self.held_out_set, 0, count * cfg.train.global_batch_size)
        with torch.no_grad(), whole_parameters(cfg, chunks):
            for chunk in chunks:
                chunk.eval()
            losses = [run_step(cfg, chunks, batches, forward_only=True) for _ in range(count)]
            for chunk in chunks:
                chunk.train()
        return sum(losses) / count

    def _step(self, batches: list[Iterator[Batch]]) -> tuple[float, float, float]:
        """Loss, gradient norm and the learning rate of this step."""
        state = self.state
        lr = state.optimizer.param_groups[0]["lr"]
        for chunk in state.chunks:
            chunk.zero_grad_buffer()
        state.optimizer.zero_grad()
        loss = run_step(self.cfg, state.chunks, batches, forward_only=False)
        with record_function(RANGE + OPTIMIZER):
            _, grad_norm, _ = state.optimizer.step()
        state.scheduler.step(1)
        return loss, float(grad_norm), lr

    def _batches(self, dataset: Dataset, start: int, stop: int) -> list[Iterator[Batch]]:
        """An iterator for each model chunk: under a virtual pipeline, first and last chunk both want the batch."""
        return [micro_batches(self.cfg, dataset, start, stop, self.device) for _ in self.state.chunks]

    def _metrics(
        self, step: int, last: int, interval: Interval, grad_norm: float, lr: float, held_out: float | None
    ) -> StepMetrics:
        train = self.cfg.train
        steps = len(interval.losses)
        step_time = (time.perf_counter() - interval.started - interval.paused) / steps
        tokens_per_s = train.global_batch_size * train.seq_length / step_time
        flops = tokens_per_s * self.speed.flops_per_token / self.speed.devices
        return StepMetrics(
            step=step,
            loss=sum(interval.losses) / steps,
            held_out_loss=held_out,
            lr=lr,
            grad_norm=grad_norm,
            step_time_s=step_time,
            tokens_per_s=tokens_per_s,
            model_tflops=flops / 1e12,
            mfu=flops / self.speed.peak_flops if self.speed.peak_flops else None,
            memory_gib=torch.cuda.max_memory_allocated() / 2**30,
            eta_s=(last - step) * step_time,
        )

    def _save(self, progress: Progress) -> Path:
        with whole_parameters(self.cfg, self.state.chunks):
            path = save(self.cfg, self.state, replace(progress, wandb_id=self.tracker.wandb_id))
        self.tracker.event("checkpoint", step=progress.step, path=str(path))
        return path
