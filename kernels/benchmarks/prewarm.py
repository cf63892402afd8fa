"""Compile what dkernel's autotuning is going to try, in several processes and without a GPU, into Triton's disk cache.

Its forward tries 12 configurations and its backward 10, each compiled in about 5 s by one core, and the backward's
anew for every length (the number of blocks is a compile-time constant). The timing run then finds them all compiled
and still does its own measuring and choosing. Nothing is launched: tensors lie on the meta device, and a stand-in
driver names the target, so that it disturbs no other work on the GPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from ..workers import Row, run_tasks, serve
from .cases import Case
from .contenders import CONTENDERS, Problem, dkernel_op
from .correctness import shortened
from .limits import refusal

CONFIGS = 12  # the longest list of configurations that one of its kernels has
_TASK_SECONDS = 240
_PEAK_TFLOPS = 990  # an H100's data sheet: what is too slow even at that is too slow at the measured rate


class _Target:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _compiling_only(index: int, capability: int) -> Iterator[list[str]]:
    """Kernel calls compile, and autotuned ones their configuration `index` alone. Gives what was compiled."""
    compiled: list[str] = []
    run, tune = JITFunction.run, Autotuner.run
    before = driver._active

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled.append(f"{kernel.__name__} {options.get('num_warps')} warps {options.get('num_stages')} stages")
        return run(kernel, *args, grid=grid, warmup=True, **options)

    def one_configuration(tuner: Any, *args: Any, **options: Any) -> None:
        if index < len(tuner.configs):
            tuner.fn.run(*args, **options, **tuner.configs[index].all_kwargs())

    driver.set_active(_Target(capability))
    JITFunction.run, Autotuner.run = compile_only, one_configuration
    try:
        yield compiled
    finally:
        JITFunction.run, Autotuner.run = run, tune
        driver._active = before


def compile_configuration(case: Case, index: int, capability: int) -> list[str]:
    """Compile configuration `index` of dkernel's forward and backward for a case; which those were.

    Raises NotSupportedError where it can't be imported or takes no such case, and what Triton raises.
    """
    # Compiled code depends on the layout through its shapes alone, and of all heads the first keeps most.
    one_head = Problem(replace(case, heads=1, kv_heads=1), torch.device("cpu"))
    op = dkernel_op(one_head)
    for name, x in list(op.named_buffers()):
        setattr(op, name, torch.empty(case.heads, *x.shape[1:], dtype=x.dtype, device="meta"))
    size = (1, case.heads, case.length, case.dim)
    q, k, v = (torch.empty(size, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3))
    with _compiling_only(index, capability) as compiled:
        out = op(q, k, v, sm_scale=case.dim**-0.5)
        torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    return compiled


def tasks(cases: Sequence[Case], capability: int, limit_seconds: float) -> list[Row]:
    """One a configuration, for every case that dkernel is going to run and the short one that it is checked on."""
    dkernel = CONTENDERS["dkernel"]
    runs = [
        case
        for case in cases
        if case.heads == case.kv_heads and refusal(dkernel, case, case, None, _PEAK_TFLOPS, limit_seconds) is None
    ]
    wanted = dict.fromkeys(each for case in runs for each in (shortened(case), case))
    # configurations of one case side by side: what cases share is then compiled once
    return [{"case": asdict(c), "index": i, "capability": capability} for c in wanted for i in range(CONFIGS)]


def prewarm(cases: Sequence[Case], jobs: int, capability: int, seconds: float, limit_seconds: float) -> int:
    """Compile for all cases in `jobs` processes, beginning none after `seconds`; how many failed.

    A failure is printed and costs no more than the time it was to save: the timing run compiles it then.
    """
    began = time.monotonic()
    wanted = tasks(cases, capability, limit_seconds)
    until = time.time() + seconds
    rows = run_tasks(["-m", __spec__.name], [task | {"until": until} for task in wanted], jobs, _TASK_SECONDS)
    failed = late = 0
    for task, row in zip(wanted, rows, strict=True):
        if "error" in row:
            failed += 1
            print(f"{Case(**task['case']).name} configuration {task['index']}: {row['error']}", flush=True)
        elif "late" in row:
            late += 1
        elif task["index"] == CONFIGS - 1:
            print(f"{Case(**task['case']).name}: compiled, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{len(wanted)} configurations in {time.monotonic() - began:.0f} s: {failed} failed, {late} left out")
    return failed


def _serve_one(task: Row) -> Row:
    if time.time() > task["until"]:
        return {"late": True}  # no "error", for which the worker would be replaced
    return {"compiled": compile_configuration(Case(**task["case"]), task["index"], task["capability"])}


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(_serve_one)
