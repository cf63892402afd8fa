"""The training loop."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from megatron.core.timers import Timers
from torch.profiler import record_function
from torch.utils.data import Dataset

from s2train.batch_sizes import batch_size, samples_of
from s2train.checkpoints.folders import Progress
from s2train.checkpoints.listing import checkpoints_of
from s2train.checkpoints.random_state import current_rng_ranks
from s2train.checkpoints.run_state import Saver, TrainingState
from s2train.command_line.commands import shell_setting
from s2train.config import PretrainConfig
from s2train.costs.memory import GIB
from s2train.costs.phases import mean_flops
from s2train.distributed.agreement import take_maximum, union_over_ranks
from s2train.errors import DivergedError, StoppedBySignal
from s2train.megatron.block_attention import kernels_of
from s2train.megatron.teacher import Teacher
from s2train.planning import Plan
from s2train.training.auxiliary_losses import AuxiliaryLosses
from s2train.training.batches import EarlyBatches, micro_batches
from s2train.training.frozen_trunk import FrozenTrunk
from s2train.training.loss_by_position import HeldOut, position_edges
from s2train.training.loss_spikes import LossHistory
from s2train.training.metrics import StepMetrics, Tracker
from s2train.training.optimizer import squared_gradient_norm, take_step, up_to_date_parameters
from s2train.training.peak_memory import PEAK_STEPS, report_peak
from s2train.training.profile import StepProfiler
from s2train.training.profile_table import DATA, OPTIMIZER, RANGE
from s2train.training.rank_process import RankProcess
from s2train.training.signals import signal_name
from s2train.training.steps import run_step

NO_TOKEN = "no token counts in the loss: all labels are -1"


@dataclass(frozen=True)
class StepOutcome:
    """What a training step reports, the same on every rank.

    Attributes:
        grad_norm: before clipping.
        lr: learning rate of the step.
        signal: that any rank received; 0 means none.
        is_writing: whether any rank still writes a save in the background.
        auxiliary: `AuxiliaryLosses.means`.
    """

    loss: float
    grad_norm: float
    lr: float
    signal: int
    is_writing: bool
    auxiliary: dict[str, float]


@dataclass
class Interval:
    """Sums since the last report.

    Attributes:
        losses: losses of the steps taken, including those before a resume.
        auxiliary: auxiliary losses of the same steps, by column and layer.
        steps, samples: steps run by this process, and their samples.
        paused: seconds spent evaluating and saving, which don't count as step time.
        timed_from: first step run by this process, if losses include those before a resume; else None.
    """

    losses: list[float] = field(default_factory=list)
    auxiliary: dict[str, list[float]] = field(default_factory=dict)
    steps: int = 0
    samples: int = 0
    started: float = field(default_factory=time.perf_counter)
    paused: float = 0.0
    timed_from: int | None = None

    def count(self, done: StepOutcome, samples: int, *, is_skipped: bool) -> None:
        """Count a step; its losses only if it changed the weights."""
        self.steps += 1
        self.samples += samples
        if is_skipped:
            return
        self.losses.append(done.loss)
        for name, value in done.auxiliary.items():
            self.auxiliary.setdefault(name, []).append(value)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time inside this context from the step time."""
        began = time.perf_counter()
        yield
        self.paused += time.perf_counter() - began


class Trainer:
    """Runs steps, evaluates, reports and saves.

    Args:
        held_out_set: None: no evaluation.
        timers: Megatron's, logged if `tracking.timing` is set.
        after_first_step: called once.
        teacher: of the layers that learn from one.
    """

    def __init__(
        self,
        cfg: PretrainConfig,
        plan: Plan,
        state: TrainingState,
        train_set: Dataset,
        held_out_set: Dataset | None,
        process: RankProcess,
        *,
        tracker: Tracker,
        timers: Timers,
        after_first_step: Callable[[], None],
        auxiliary: AuxiliaryLosses,
        teacher: Teacher | None = None,
    ) -> None:
        self.cfg, self.plan, self.state, self.process, self.tracker = cfg, plan, state, process, tracker
        self.train_set, self.held_out_set, self.timers = train_set, held_out_set, timers
        self.after_first_step, self.auxiliary, self.teacher = after_first_step, auxiliary, teacher
        self.loss_history = LossHistory()
        self.frozen = FrozenTrunk(state.chunks, cfg.train.freeze_trunk_steps)
        self.saver = Saver(cfg, state, tracker.checkpoint)

    def train(self, progress: Progress) -> Path | None:
        """Train from `progress` to the last step.

        Returns:
            The checkpoint of the last step; None without `checkpoint.save`.
        Raises:
            DivergedError: too many steps in a row had a loss or gradient that is not finite.
            TrainingError: a checkpoint can't be written.
            StoppedBySignal: a signal stopped the run, after saving.
        """
        cfg = self.cfg
        first, last = progress.step + 1, cfg.train.last_step
        consumed = progress.consumed_samples
        stop = consumed + samples_of(cfg.train, last - progress.step, consumed)
        batches, size = self._batches(self.train_set, consumed, stop), batch_size(cfg.train, consumed)
        self.loss_history = LossHistory(**progress.health)
        earlier = {name: list(values) for name, values in progress.auxiliary.items()}
        interval = Interval(list(progress.losses), earlier, timed_from=first if progress.losses else None)
        saved: Path | None = None
        profiler = StepProfiler(cfg, self.state.chunks, self.tracker)
        is_save_due = False
        for step in range(first, last + 1):
            self.process.watchdog.beat(f"step {step}")
            before, size = size, batch_size(cfg.train, consumed)
            if size != before:
                self._report_growth(step, before, size)
            with profiler.step(step):
                done = self._step(batches, step, consumed, size)
            interval.paused += profiler.pause_s()
            consumed += size
            interval.count(done, size, is_skipped=bool(self.loss_history.skipped_in_row))
            if step == first:
                self._report_start(step)
            has_state = step > first or progress.step > 0  # Adam's state exists
            if step == min(progress.step + PEAK_STEPS, last) and has_state:
                report_peak(self.plan.memory, self.tracker)
            is_last, is_stopping = step == last, bool(done.signal)
            with interval.pause():
                held_out = self._held_out_loss(step) if self._is_evaluated(step) or is_last else None
            is_due = self._is_due(step)
            if is_due or is_last or is_stopping:
                self.tracker.report(self._metrics(step, stop, consumed, interval, done, held_out))
                self._report_timers(interval.steps)
            if is_due:  # a report at an early end is extra: an uninterrupted run has none here
                interval = Interval()
            is_save_due |= step % cfg.checkpoint.interval == 0
            # A step that is skipped postpones the save: the one before it may have spoilt the weights.
            saves_now = is_last or is_stopping or (is_save_due and not self.loss_history.skipped_in_row)
            with interval.pause():
                if cfg.checkpoint.save and saves_now:
                    saved = self._save(replace(progress, step=step, consumed_samples=consumed), interval)
                    is_save_due = False
                elif not done.is_writing:
                    self.saver.poll()
            if is_stopping and not is_last:
                self.saver.close()
                raise StoppedBySignal(signal_name(done.signal), step, saved)
        self.process.watchdog.beat("the last save")
        self.saver.close()
        return saved

    def _report_growth(self, step: int, before: int, size: int) -> None:
        """Log that the global batch grows with this step."""
        self.tracker.note(f"step {step} | the global batch grows from {before} to {size} sequences")
        self.tracker.event("batch size", step=step - 1, tokens_per_step=size * self.cfg.train.seq_length)

    def _report_start(self, step: int) -> None:
        """Log times up to the first step, and the kernels used."""
        self.process.times.end("first step")
        self.tracker.note(f"step {step} done after {self.process.times}")
        self.tracker.first_step(self.process.times.seconds)
        self.after_first_step()
        for kernels in kernels_of(self.state.chunks):
            self.tracker.note(kernels)

    def _report_timers(self, steps: int) -> None:
        """Log Megatron's times per step, if they are asked for; collective."""
        if self.cfg.tracking.timing:
            # Megatron matches times by place, and ranks of a pipeline have different timers.
            names = union_over_ranks(self.timers._timers)
            self.tracker.note(self.timers.get_all_timers_string(names, normalizer=steps))

    def _held_out_loss(self, step: int) -> HeldOut | None:
        """Compute the loss over the first `evaluation.batches` held-out global batches.

        All tokens that count have the same weight. A batch without any is logged. The loss is NaN if none has one. None
        without held-out data.
        """
        if self.held_out_set is None:
            return None
        self.process.watchdog.beat(f"evaluation after step {step}")
        cfg, chunks = self.cfg, self.state.chunks
        count, edges = cfg.evaluation.batches, position_edges(cfg.train.seq_length)
        size = cfg.train.global_batch_size
        batches = self._batches(self.held_out_set, 0, count * size)
        with torch.no_grad(), up_to_date_parameters(cfg, chunks):
            for chunk in chunks:
                chunk.eval()
            sums = [
                run_step(cfg, chunks, batches, forward_only=True, batch_size=size, edges=edges) for _ in range(count)
            ]
            for chunk in chunks:
                chunk.train()
        by_batch = torch.stack(sums)  # [batches, ranges, 2]
        if empty := by_batch[..., 1].sum(dim=1).tolist().count(0):
            self.tracker.note(f"step {step} | {empty} of {count} held-out batches: {NO_TOKEN}")
        return HeldOut.of(edges, by_batch.sum(dim=0))

    def _is_evaluated(self, step: int) -> bool:
        return self.held_out_set is not None and step % self.cfg.evaluation.interval == 0

    def _is_due(self, step: int) -> bool:
        """Whether a report is due after a step.

        This does not depend on where the run starts or ends early.
        """
        cfg = self.cfg
        return step % cfg.tracking.log_interval == 0 or self._is_evaluated(step) or step == cfg.train.steps

    def _step(self, batches: list[EarlyBatches], step: int, consumed: int, size: int) -> StepOutcome:
        """Run one training step.

        If loss or gradient is not finite on any rank, or no token counts in the loss, all ranks skip the step.

        Args:
            consumed: samples before it.
            size: its global batch size.
        """
        state = self.state
        lr = state.optimizer.param_groups[0]["lr"]
        for chunk in state.chunks:
            chunk.zero_grad_buffer()
        state.optimizer.zero_grad()
        self.auxiliary.begin_step(step, is_logged=self._is_due(step), batch=size, batches=batches[0])
        sums = run_step(self.cfg, state.chunks, batches, forward_only=False, batch_size=size, teacher=self.teacher)
        self.frozen.hold(state.optimizer, state.scheduler.num_steps)
        with record_function(RANGE + OPTIMIZER):
            squared_norm = squared_gradient_norm(state.optimizer)
            results = torch.cat([sums.flatten(), squared_norm.double()])
            values = torch.cat([self._agreement(results), results, self.auxiliary.take()])
        if step < self.cfg.train.last_step:
            with record_function(RANGE + DATA):  # now, while the GPU has work
                early = self.auxiliary.early_batches(batch_size(self.cfg.train, consumed + size))
                for each in batches:
                    each.fetch(early)
        # One read of all: each waits, and the GPU is idle from here until the optimizer's kernels are launched.
        is_bad, signal, is_writing, total, tokens, square, *auxiliary = values.tolist()
        share = tokens / (size * self.cfg.train.seq_length)
        loss, grad_norm = (total / tokens, square**0.5 / share) if tokens else (math.nan, square**0.5)
        if is_bad or not tokens:
            state.scheduler.step(0)  # restores the weight decay, which is 0 in the steps of a frozen trunk
            reason = f"loss {loss}, gradient norm {grad_norm}" if tokens else NO_TOKEN
            self._skip(step, loss, reason, consumed, size)
        else:
            if factor := self.loss_history.spike(loss, self.cfg.train.spike_factor):
                self._log_batch(
                    "spike", step, consumed, size, f"loss {loss:.4f} is {factor:.1f} × the running mean", loss
                )
            with record_function(RANGE + OPTIMIZER):
                take_step(state.optimizer, grad_norm, share)
            state.scheduler.step(1)
            self.loss_history = self.loss_history.after_step(loss)
        return StepOutcome(loss, grad_norm, lr, int(signal), bool(is_writing), self.auxiliary.means(auxiliary))

    def _agreement(self, results: torch.Tensor) -> torch.Tensor:
        """Return what ranks agree on after a step.

        It is whether any rank's result isn't finite, any rank's signal, and whether any rank still writes a save.
        Collective; doesn't wait for the GPU. A signal that arrives while the host waits for the results is agreed on
        in the next step.

        Returns:
            Float64 [3].
        """
        is_bad = ~results.isfinite().all(dim=0, keepdim=True)
        own = (results.new_full((1,), value) for value in (self.process.signals.received, self.saver.is_writing()))
        return take_maximum(torch.cat([is_bad.double(), *own]))

    def _skip(self, step: int, loss: float, reason: str, consumed: int, size: int) -> None:
        self.loss_history = self.loss_history.after_skip()
        self._log_batch("skipped", step, consumed, size, f"skipped: {reason}", loss)
        limit = self.cfg.train.max_skipped_steps
        if self.loss_history.skipped_in_row > limit:
            self.saver.close()
            saved = checkpoints_of(self.cfg.run_dir)
            change = "data.path without such documents" if reason == NO_TOKEN else "a lower optim.lr or optim.clip_grad"
            raise DivergedError(
                f"step {step}: {reason}; train.max_skipped_steps={limit} steps in a row before it were skipped for the"
                " same reason. Nothing was saved. Resume from an earlier checkpoint in another run_dir"
                f" ({shell_setting('checkpoint.resume', saved[-1]) if saved else 'checkpoint.resume=…'}), with {change}"
            )

    def _log_batch(self, event: str, step: int, consumed: int, size: int, what: str, loss: float) -> None:
        """Log an event of a step with its range of training samples."""
        last = consumed + size - 1
        self.tracker.note(f"step {step} | samples {consumed} to {last} | {what}")
        self.tracker.event(
            event, step=step, samples=[consumed, last], loss_of_step=loss, skipped=self.loss_history.skipped
        )

    def _batches(self, dataset: Dataset, start: int, stop: int) -> list[EarlyBatches]:
        """Make an iterator of micro batches for each model chunk.

        Under a virtual pipeline, both the first and the last chunk need the batch.
        """
        return [
            EarlyBatches(micro_batches(self.cfg, dataset, start, stop, self.process.device)) for _ in self.state.chunks
        ]

    def _metrics(
        self,
        step: int,
        stop: int,
        consumed: int,
        interval: Interval,
        done: StepOutcome,
        held_out: HeldOut | None,
    ) -> StepMetrics:
        length, losses = self.cfg.train.seq_length, interval.losses
        seconds = time.perf_counter() - interval.started - interval.paused
        tokens_per_s = interval.samples * length / seconds
        flops_per_token = mean_flops(self.plan.phases, step - interval.steps + 1, step)
        flops = tokens_per_s * flops_per_token / self.plan.world_size
        peak = self.plan.hardware.peak_flops(self.cfg.train.precision)
        return StepMetrics(
            step=step,
            consumed_tokens=consumed * length,
            loss=sum(losses) / len(losses) if losses else math.nan,
            held_out_loss=None if held_out is None else held_out.loss,
            lr=done.lr,
            grad_norm=done.grad_norm,
            skipped=self.loss_history.skipped,
            step_time_s=seconds / interval.steps,
            tokens_per_s=tokens_per_s,
            model_tflops=flops / 1e12,
            mfu=flops / peak if peak else None,
            memory_gib=torch.cuda.max_memory_allocated() / GIB,
            eta_s=(stop - consumed) * length / tokens_per_s,
            timed_from=interval.timed_from,
            held_out_loss_by_position=None if held_out is None else held_out.by_position,
            held_out_short=None if held_out is None else held_out.short,
            held_out_long=None if held_out is None else held_out.long,
            auxiliary={name: sum(values) / len(values) for name, values in interval.auxiliary.items()},
        )

    def _save(self, progress: Progress, interval: Interval) -> Path:
        self.process.watchdog.beat(f"save after step {progress.step}")
        progress = replace(
            progress,
            losses=list(interval.losses),  # copies, since a background save writes them later
            auxiliary=deepcopy(interval.auxiliary),
            wandb_id=self.tracker.wandb_id,
            health=asdict(self.loss_history),
            rng_ranks=current_rng_ranks(),
        )
        with up_to_date_parameters(self.cfg, self.state.chunks):
            return self.saver.save(progress)
