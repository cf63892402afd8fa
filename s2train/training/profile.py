"""Traces of chosen steps (`profile.steps`), and the table of what their time went to."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from s2train.config import PretrainConfig
from s2train.megatron.core_attention import CausalCoreAttention
from s2train.training.breakdown import RANGE, Breakdown, breakdown, read_trace


class _Edge(torch.autograd.Function):
    """Hands tensors on; in the backward pass calls a function when all their gradients are there."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], None], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.call = call
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.call()
        return (None, *gradients)


class _Ranged:
    """A core attention's forward with ranges around it and around its backward, by kind of attention."""

    def __init__(self, module: CausalCoreAttention) -> None:
        self.module, self.forward = module, module.forward
        self.name = f"{RANGE}attention {module.layer_layout.kind.name}"

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        with record_function(f"{self.name} forward"):
            if not torch.is_grad_enabled():
                return self.forward(query, key, value, *args, **kwargs)
            backward = contextlib.ExitStack()
            query, key, value = _Edge.apply(backward.close, query, key, value)
            out = self.forward(query, key, value, *args, **kwargs)
            (out,) = _Edge.apply(lambda: backward.enter_context(record_function(f"{self.name} backward")), out)
            return out


@contextlib.contextmanager
def attention_ranges(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Ranges around the core attention of these models, forward and backward, by kind."""
    modules = [m for model in models for m in model.modules() if isinstance(m, CausalCoreAttention)]
    for module in modules:
        module.forward = _Ranged(module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # the instance's: the class's shows again


class StepProfiler:
    """Traces steps `profile.steps` of a run on `profile.ranks`; on other ranks and without steps it does nothing.

    Writes `profile/trace-rank0.json.gz` (chrome://tracing, ui.perfetto.dev) and `profile/breakdown-rank0.json`.

    Args:
        models: whose attention gets ranges.
        note: told the table, on rank 0.
    """

    def __init__(self, cfg: PretrainConfig, models: list[torch.nn.Module], note: Callable[[str], None]) -> None:
        rank = torch.distributed.get_rank()
        self._first, self._last = cfg.profile.steps if cfg.profile.steps and rank in cfg.profile.ranks else (None, None)
        self._models, self._note, self._rank = models, note, rank
        self._folder = Path(cfg.run_dir) / "profile"
        self._open: contextlib.ExitStack | None = None
        self._profiler: profile | None = None

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step; `number` counts from 1."""
        if self._first is None or self._last is None or not self._first - 1 <= number <= self._last:
            yield
            return
        if self._profiler is None:
            self._start(number)
        assert self._profiler is not None
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the trace ends with its kernels
        self._profiler.step()
        if number == self._last:
            self._finish()

    def _start(self, number: int) -> None:
        assert self._first is not None and self._last is not None
        warmup = max(self._first - number, 0)  # the tracer's own first use would count as the step's
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=warmup, active=self._last - max(self._first, number) + 1, repeat=1),
            on_trace_ready=self._write,
        )
        self._open = contextlib.ExitStack()
        self._open.enter_context(attention_ranges(self._models))
        self._profiler.start()

    def _finish(self) -> None:
        assert self._profiler is not None and self._open is not None
        self._profiler.stop()
        self._open.close()

    def _write(self, profiler: profile) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"trace-rank{self._rank}.json.gz"
        profiler.export_chrome_trace(str(trace))
        found = breakdown(read_trace(trace))
        (self._folder / f"breakdown-rank{self._rank}.json").write_text(json.dumps(asdict(found), indent=1) + "\n")
        self._note(self._text(found, trace))

    def _text(self, found: Breakdown, trace: Path) -> str:
        steps = f"step {self._first}" if self._first == self._last else f"steps {self._first} to {self._last}"
        return f"where the time of {steps} went ({found.device})\n{found.format()}\ntrace {trace}"
