"""Time single eager calls, host included, and where the host's time goes.

Our op, dense cuDNN and dense FlashAttention-2 take turns. `eager_ms` is a single call from an idle device to its end,
`host_us` the host's time of a call while the device is busy, `device_ms` with the host ahead. `ratios` are the peers'
`eager_ms` over ours. `host` divides a call of ours in the first case, in us: by the clock while it runs (`passes`, with
autograd's threads and without), and into parts that are called alone (`parts`). The whole takes about 20 seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .. import triton_backend
from ..attention import block_sparse_attention
from ..provenance import origin
from .cases import Case, parse_case
from .contenders import CONTENDERS, Attention, Problem
from .inputs import make_inputs
from .program import add_device, add_output, check_device, check_output, machine, write_results
from .run import Record, failures
from .timing import Clock, launch_costs

_CONTENDERS = ("ours", "cudnn", "flash2")
_WARM = 5
_CALLS = 200  # of each part; the device keeps up with their launches


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if a contender fails."""
    args = _parse(arguments)
    device = torch.device(args.device)
    clock = Clock(device)
    data: Record = {**origin("kernels.benchmarks.eager", arguments), "machine": machine(device), "cases": []}
    for word in args.cases:
        data["cases"].append(measure(parse_case(word), device, clock, args.rounds))
        write_results(data, args.output)
    if device.type == "cuda":
        data["host"] = host_times(parse_case(args.cases[0]), device)
        write_results(data, args.output)
    print(json.dumps(data, indent=1))
    errors = [result["error"] for case in data["cases"] for result in case["results"].values() if "error" in result]
    return int(any(not error.startswith("not supported") for error in errors))


def measure(case: Case, device: torch.device, clock: Clock, rounds: int) -> Record:
    """Measure the contenders' calls in turn, `rounds` times each; keep the medians."""
    problem = Problem(case, device)
    steps: dict[str, dict[str, Callable[[], object]]] = {}
    results: Record = {}
    for name in _CONTENDERS:
        with failures() as failed:
            steps[name] = _steps(CONTENDERS[name].prepare(problem), case, CONTENDERS[name].format, device)
            for step in steps[name].values():
                _repeat(step, _WARM)
        if failed:
            steps.pop(name, None)
            results[name] = {"error": failed[0]}
    found: dict[str, dict[str, list[Record]]] = {name: {} for name in steps}
    for _ in range(rounds):
        for name, passes in steps.items():
            for which, step in passes.items():
                found[name].setdefault(which, []).append(launch_costs(step, clock))
    for name, costs in found.items():
        results[name] = {which: _medians(rows) for which, rows in costs.items()}
    ratios = {
        name: {which: result[which]["eager_ms"] / results["ours"][which]["eager_ms"] for which in result}
        for name, result in results.items()
        if name != "ours" and "error" not in result and "error" not in results["ours"]
    }
    return {"case": case.name, "results": results, "ratios": ratios}


def _steps(attend: Attention, case: Case, format: Any, device: torch.device) -> dict[str, Callable[[], object]]:
    q, k, v, dout = make_inputs(case, 1, format, device)

    def forward() -> object:
        with torch.no_grad():
            return attend(q, k, v)

    return {"forward": forward, "both": lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), dout)}


def _medians(costs: list[Record]) -> Record:
    names = [name for name, value in costs[0].items() if isinstance(value, float)]
    return {name: median(cost[name] for cost in costs) for name in names}


def host_times(case: Case, device: torch.device) -> Record:
    """Divide the host's time of our call, in us."""
    q, k, v, dout = make_inputs(case, 1, "sbhd", device)
    layout = case.layout(device)

    def attend() -> Tensor:
        return block_sparse_attention(q, k, v, layout)

    threads, alone = (_passes(attend, (q, k, v), dout, threads) for threads in (True, False))
    return {
        "case": case.name,
        "passes": {"with autograd's threads": threads, "without": alone},
        "parts": {name: _busy(part) for name, part in _parts(attend, q, k, v, dout).items()},
    }


def _passes(attend: Callable[[], Tensor], leaves: tuple[Tensor, ...], dout: Tensor, threads: bool) -> Record:
    """Clock the stages of single calls.

    Each begins on an idle device. Stages: forward, way to our backward, our backward, way back, wait for the device.
    """
    marks: list[float] = []
    module: Any = triton_backend
    ours = module.run_gradients

    def timed(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        marks.append(time.perf_counter())
        result = ours(*arguments)
        marks.append(time.perf_counter())
        return result

    spans = []
    module.run_gradients = timed
    try:
        with torch.autograd.set_multithreading_enabled(threads):
            for _ in range(_WARM + _CALLS):
                torch.cuda.synchronize()
                marks.clear()
                marks.append(time.perf_counter())
                out = attend()
                marks.append(time.perf_counter())
                torch.autograd.grad(out, leaves, dout)
                marks.append(time.perf_counter())
                torch.cuda.synchronize()
                marks.append(time.perf_counter())
                spans.append([1e6 * (after - before) for before, after in pairwise(marks)])
    finally:
        module.run_gradients = ours
    # in order of time: start, forward's end, our backward's begin and end, end of grad, end of the device's work
    names = ("forward", "to backward", "backward", "return", "device")
    columns = zip(*spans[_WARM:], strict=True)
    return dict(zip(names, (median(column) for column in columns), strict=True))


class _Nothing(torch.autograd.Function):
    """Saves tensors as our function does, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: None, call: None) -> tuple[Tensor, Tensor]:
        out, lse = q.detach(), k.detach()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        return q, k, v, None, None


def _parts(
    attend: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> dict[str, Callable[[], object]]:
    """Return parts of a call, to be clocked alone."""
    leaves, device = (q, k, v), q.device
    one = torch.ones(1, device=device)
    out = attend()
    assert out.grad_fn is not None
    node: Any = out.grad_fn
    q_saved, k_saved, v_saved, out_saved, lse_saved, _ = node.saved_tensors

    def without_gradients() -> object:
        with torch.no_grad():
            return attend()

    def without_threads() -> object:
        with torch.autograd.set_multithreading_enabled(False):
            return torch.autograd.grad(attend(), leaves, dout)

    def empty_function() -> object:
        return torch.autograd.grad(_Nothing.apply(q, k, v, None, None)[0], leaves, dout)

    def empty_function_without_threads() -> object:
        with torch.autograd.set_multithreading_enabled(False):
            return empty_function()

    def python() -> object:
        total = 0
        for number in range(1000):
            total += number
        return total

    def gradients() -> object:
        return triton_backend.run_gradients(
            q_saved, k_saved, v_saved, out_saved, lse_saved, dout, None, node.layout, node.call
        )

    return {
        "1,000 additions in Python": python,
        "forward and backward": lambda: torch.autograd.grad(attend(), leaves, dout),
        "the same without autograd's threads": without_threads,
        "forward": attend,
        "forward without gradients": without_gradients,
        "forward's outputs and launch": lambda: node.call.forward(q, k, v),
        "backward, called directly": gradients,
        "autograd function that does nothing, and its backward": empty_function,
        "the same without threads": empty_function_without_threads,
        "multiplication and its backward": lambda: torch.autograd.grad(q * 2, q, dout),
        "a small addition in place": lambda: one.add_(1),
        "torch.empty": lambda: torch.empty(q.shape, dtype=q.dtype, device=device),
        "torch.zeros": lambda: torch.zeros(q.shape, dtype=torch.float32, device=device),
        "torch.cuda.current_device": torch.cuda.current_device,
    }


def _busy(part: Callable[[], object]) -> float:
    """Return a call's host time in us while the device is busy.

    It is the median of rounds.
    """
    rounds = []
    for _ in range(5):
        _repeat(part, _WARM)
        torch.cuda.synchronize()
        torch.cuda._sleep(50_000_000)  # 25 ms or more
        begin = time.perf_counter()
        _repeat(part, _CALLS // 5)
        rounds.append(1e6 * (time.perf_counter() - begin) / (_CALLS // 5))
        torch.cuda.synchronize()
    return median(rounds)


def _repeat(step: Callable[[], object], times: int) -> None:
    for _ in range(times):
        step()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m s2train.kernels.benchmarks.eager",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", nargs="+", default=["b128-l8-v16-2k", "b128-l8-v16-8k"])
    add_output(parser, "eager", "JSON, also printed")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    add_device(parser)
    args = parser.parse_args(arguments)
    try:
        for word in args.cases:
            parse_case(word)
    except ValueError as error:
        parser.error(str(error))
    check_output(parser, args)
    check_device(parser, args)
    return args


if __name__ == "__main__":
    sys.exit(main())
