"""Traces chosen steps (`profile.steps`) and tabulates where their time went."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from s2train.config import PretrainConfig
from s2train.files import set_aside, write_json
from s2train.megatron.core_attention import CausalCoreAttention, cores_of
from s2train.training.metrics import Tracker
from s2train.training.profile_table import RANGE, profile_table, read_trace


class _BackwardHook(torch.autograd.Function):
    """Identity that calls a function when its outputs' gradients are complete."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], None], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.call = call
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.call()
        return (None, *gradients)


class _AnnotatedForward:
    """A core attention's forward, annotated with profiler ranges around forward and backward."""

    def __init__(self, module: CausalCoreAttention) -> None:
        self.module, self.forward = module, module.forward
        self.name = f"{RANGE}attention {module.layer_layout.kind.label}"

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        with record_function(f"{self.name} forward"):
            if not torch.is_grad_enabled():
                return self.forward(query, key, value, *args, **kwargs)
            backward = contextlib.ExitStack()
            query, key, value = _BackwardHook.apply(backward.close, query, key, value)
            out = self.forward(query, key, value, *args, **kwargs)
            (out,) = _BackwardHook.apply(lambda: backward.enter_context(record_function(f"{self.name} backward")), out)
            return out


@contextlib.contextmanager
def attention_ranges(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Annotate the core attention of these models with profiler ranges.

    Forward and backward each have a range, named by the kind of attention.
    """
    modules = cores_of(*models)
    for module in modules:
        module.forward = _AnnotatedForward(module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # the instance attribute, which hid the class's method


class StepProfiler:
    """Traces steps `profile.steps` of a run on `profile.ranks`.

    Does nothing on other ranks or without steps. Writes `profile/trace-rank0.json.gz` (for chrome://tracing or
    ui.perfetto.dev) and `profile/breakdown-rank0.json`. A run that resumes among the steps traces those that are left;
    earlier files are renamed.

    Args:
        models: models whose attention is annotated.
        tracker: logs the table, on rank 0, and the event `profile` with the same numbers.
    """

    def __init__(self, cfg: PretrainConfig, models: Sequence[torch.nn.Module], tracker: Tracker) -> None:
        self._rank, self._written_s = torch.distributed.get_rank(), 0.0
        first, last = cfg.profile.steps if cfg.profile.steps and self._rank in cfg.profile.ranks else (0, -1)
        self._steps = self._traced = range(first, last + 1)
        self._models, self._tracker = models, tracker
        self._folder = Path(cfg.run_dir) / "profile"
        self._running: contextlib.ExitStack | None = None
        self._profiler: profile | None = None

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Trace a step if it is chosen; `number` counts from 1."""
        if self._running is None and self._steps and self._steps[0] - 1 <= number <= self._steps[-1]:
            self._start(number)
        yield
        if self._running is None or self._profiler is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the step ends with its kernels
        self._profiler.step()
        if number == self._steps[-1]:
            self._running.close()
            self._running = self._profiler = None

    def pause_s(self) -> float:
        """Seconds spent writing traces since the last call."""
        written, self._written_s = self._written_s, 0.0
        return written

    def _start(self, number: int) -> None:
        warmup = int(number < self._steps[0])  # otherwise the profiler's own start-up would count as the step's time
        self._traced = range(number + warmup, self._steps[-1] + 1)
        self._running = contextlib.ExitStack()
        self._running.enter_context(attention_ranges(self._models))
        self._profiler = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])],
            schedule=schedule(wait=0, warmup=warmup, active=len(self._traced), repeat=1),
            on_trace_ready=self._write,
        )
        self._running.enter_context(self._profiler)

    def _write(self, profiler: profile) -> None:
        started = time.perf_counter()
        self._folder.mkdir(parents=True, exist_ok=True)
        trace, breakdown = (self._folder / f"{name}-rank{self._rank}.json" for name in ("trace", "breakdown"))
        trace = trace.with_suffix(".json.gz")
        for path in (trace, breakdown):
            set_aside(path)
        profiler.export_chrome_trace(str(trace))
        found = profile_table(read_trace(trace))
        write_json(breakdown, asdict(found))
        steps = f"{self._traced[0]} to {self._traced[-1]}"
        self._tracker.event("profile", traced=list(self._traced), **asdict(found))
        self._tracker.note(f"where the time of steps {steps} went ({found.device})\n{found.format()}\ntrace {trace}")
        self._written_s += time.perf_counter() - started
