"""Run cases one after another: check every contender, then time it."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..relative_error import relative_error
from .cases import Case
from .contenders import CONTENDERS, Attention, Contender, NotSupportedError, Problem
from .correctness import Exact, Results, full_problem, sample, short_problem, shortened
from .inputs import make_inputs
from .limits import skip_reason
from .timing import Clock, launch_costs, time_passes

Record = dict[str, Any]
_COMPARED_KEYS = 64  # keys whose dk and dv the sparse contenders must agree on


@dataclass
class Session:
    """State that the cases of one run share.

    Attributes:
        budget_ms: device time for the passes of one contender in one case.
        deadline: `time.monotonic()` after which nothing new is started.
        seed: of every input.
        ceiling_tflops: the device's measured rate of matrix products.
        limit_seconds: contenders whose passes of a case take longer, even at that rate, are not run.
    """

    device: torch.device
    contenders: tuple[str, ...]
    budget_ms: float
    deadline: float
    seed: int
    clock: Clock
    ceiling_tflops: float
    limit_seconds: float = math.inf
    lost: str | None = None  # why the device can no longer be used
    _short: dict[Case, Exact] = field(default_factory=dict)
    _passed: dict[tuple[str, Case], Record] = field(default_factory=dict)
    _dense: dict[tuple[str, Case], Record] = field(default_factory=dict)

    def run_case(self, case: Case, progress: Callable[[str], None] = lambda line: None) -> Record:
        """Measure every contender, under "results"; failures have "error".

        `progress` gets a line before each contender.
        """
        record: Record = {"case": case.name} | asdict(case) | {"density": case.density(), "results": {}}
        problem = Problem(case, self.device)
        samples: dict[str, Results] = {}
        exact: dict[Case, Exact] = {}  # of the sparse mask and, if needed, the dense contenders'
        for name in self.contenders:
            contender = CONTENDERS[name]
            mask = case if contender.sparse else _dense_twin(case)
            progress(f"{case.name}: {contender.label}")
            record["results"][name] = self._result(contender, problem, mask, exact, samples)
        if case in exact:
            _compare(record["results"], samples, exact[case].limits)
        return record

    def _result(
        self, contender: Contender, problem: Problem, mask: Case, exact: dict[Case, Exact], samples: dict[str, Results]
    ) -> Record:
        if not contender.sparse and (contender.name, mask) in self._dense:
            return self._dense[contender.name, mask]
        if self.lost is not None:
            return {"error": f"not run: {self.lost}"}
        if time.monotonic() > self.deadline:
            return {"error": "not run: out of time"}
        memory = torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else None
        why = skip_reason(contender, problem.case, mask, memory, self.ceiling_tflops, self.limit_seconds)
        if why is not None:
            return {"error": f"not run: {why}"}
        began = time.monotonic()
        result: Record = {}
        with failures() as failed:
            result = self._checked_figures(contender, problem, mask, exact, samples)
        if failed:
            result = {"error": failed[0]}
            self._recover()
        result["seconds"] = time.monotonic() - began
        if not contender.sparse:
            self._dense[contender.name, mask] = result
        return result

    def _checked_figures(
        self, contender: Contender, problem: Problem, mask: Case, exact: dict[Case, Exact], samples: dict[str, Results]
    ) -> Record:
        short = self._check_short(contender, mask)
        if short["wrong"]:
            return {"error": f"wrong at {short['length']} tokens: {short['wrong']}", "checks": {"short": short}}
        if mask not in exact:
            exact[mask] = full_problem(mask, self.seed, self._short_problem(mask).limits, self.device)
        figures = self._full(contender, problem, mask, exact[mask], samples)
        figures["checks"]["short"] = short
        return figures

    def _short_problem(self, mask: Case) -> Exact:
        key = shortened(mask)
        if key not in self._short:
            self._short[key] = short_problem(key, self.seed, self.device)
        return self._short[key]

    def _check_short(self, contender: Contender, mask: Case) -> Record:
        key = (contender.name, shortened(mask))
        if key not in self._passed:
            exact = self._short_problem(mask)
            attend = contender.prepare(Problem(exact.case, self.device))
            q, k, v, dout = make_inputs(exact.case, self.seed, contender.format, self.device)
            out = attend(q, k, v)
            errors = exact.errors(out, torch.autograd.grad(out, (q, k, v), dout), contender.format)
            self._passed[key] = {
                "length": exact.case.length, "errors": errors, "limits": exact.limits, "wrong": exact.wrong(errors),
            }  # fmt: skip
        return self._passed[key]

    def _full(
        self, contender: Contender, problem: Problem, mask: Case, exact: Exact, samples: dict[str, Results]
    ) -> Record:
        case = problem.case
        q, k, v, dout = make_inputs(case, self.seed, contender.format, self.device)
        shared = problem.layout.nbytes if contender.name == "ours" else 0
        gc.collect()  # another contender's garbage must not be freed meanwhile
        before = self._allocated()
        attend = contender.prepare(problem)

        def forward() -> Tensor:
            return attend(q, k, v)

        def backward(out: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, (q, k, v), dout)

        # not for the peers, whose launchers are not Triton's
        with _launched_kernels() if contender.name == "ours" else nullcontext(set[str]()) as kernels:
            out = forward()
            gradients = backward(out)
        errors = exact.errors(out, gradients, contender.format)
        checks: Record = {"full": {"errors": errors, "wrong": exact.wrong(errors)}}
        if checks["full"]["wrong"]:
            raise WrongResultError(f"wrong at {case.length} tokens: {errors}, allowed {exact.limits}")
        if contender.sparse:
            early = torch.arange(0, case.length, max(1, case.length // _COMPARED_KEYS), device=self.device)
            found = sample(out, gradients, contender.format, early, early)
            samples[contender.name] = {name: x.cpu() for name, x in found.items()}  # outlives a lost device
        del out, gradients
        self._reset_peak()
        figures = time_passes(forward, backward, self.clock, self.budget_ms)
        peak = None if self.device.type != "cuda" else torch.cuda.max_memory_allocated() - before + shared
        flops = 4 * case.dim * mask.kept_positions()
        work = {"forward": flops, "backward": 2.5 * flops, "both": 3.5 * flops}
        tflops = {name: work[name] / ms / 1e9 for name, ms in figures["ms"].items()}
        of_ceiling = {name: rate / self.ceiling_tflops for name, rate in tflops.items()}
        figures |= {"tflops": tflops, "of_ceiling": of_ceiling, "peak_bytes": peak}
        return figures | {"format": contender.format, "kernels": sorted(kernels), "checks": checks}

    def launches(self, case: Case) -> Record:
        """Measure launch costs of every contender.

        Forward runs without gradients, and then with backward.
        """
        record: Record = {"case": case.name, "results": {}}
        problem = Problem(case, self.device)
        for name in self.contenders:
            if self.lost is not None or time.monotonic() > self.deadline:
                record["results"][name] = {"error": "not run: out of time" if self.lost is None else self.lost}
                continue
            with failures() as failed:
                record["results"][name] = self._launch(CONTENDERS[name], problem)
            if failed:
                self._recover()
                record["results"][name] = {"error": failed[0]}
        return record

    def _launch(self, contender: Contender, problem: Problem) -> Record:
        attend: Attention = contender.prepare(problem)
        q, k, v, dout = make_inputs(problem.case, self.seed, contender.format, self.device)

        def step() -> None:
            torch.autograd.grad(attend(q, k, v), (q, k, v), dout)

        for _ in range(3):
            step()
        both = launch_costs(step, self.clock)
        with torch.no_grad():
            # compiled contenders recompile without gradients
            for _ in range(3):
                attend(q, k, v)
            forward = launch_costs(lambda: attend(q, k, v), self.clock)
        return {"forward": forward, "both": both}

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def _recover(self) -> None:
        """Free a failed contender's memory, and check that the device works."""
        gc.collect()
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            self.lost = f"the device failed before: {error}"[:200]


class WrongResultError(Exception):
    """A contender's result differs from the oracle's."""


def run_cases(
    session: Session, cases: Iterable[Case], report: Callable[[Record], None], progress: Callable[[str], None]
) -> None:
    """Run cases one after another.

    `report` gets each finished record, `progress` a line for each start.
    """
    for case in cases:
        report(session.run_case(case, progress))
        if session.device.type == "cuda" and session.lost is None:
            torch.cuda.empty_cache()


def _dense_twin(case: Case) -> Case:
    """Return the problem of contenders that ignore the mask.

    It is the same for every mask.
    """
    return Case(128 if case.length % 128 == 0 else case.block, 1, 1, case.length, case.heads, case.kv_heads, case.dim)


def _compare(results: dict[str, Record], samples: dict[str, Results], limits: dict[str, float]) -> None:
    """Remove times of sparse contenders that disagree with ours at full length.

    Our times are removed too. Each may err by its limit, so two may differ by twice that.
    """
    if "ours" not in samples:
        return
    for name, theirs in samples.items():
        if name == "ours" or "ms" not in results[name]:
            continue
        differences = {key: relative_error(theirs[key], samples["ours"][key]) for key in limits}
        results[name]["checks"]["from_ours"] = differences
        if not all(differences[key] <= 2 * limits[key] for key in limits):
            for both in ("ours", name):
                results[both] = {"error": f"ours and {name} disagree: {differences}", "checks": results[both]["checks"]}


@contextmanager
def failures() -> Iterator[list[str]]:
    """Collect a contender's exception as text."""
    said: list[str] = []
    try:
        yield said
    except NotSupportedError as error:
        said.append(f"not supported: {error}")
    except WrongResultError as error:
        said.append(str(error))
    except torch.OutOfMemoryError:
        said.append("out of memory")
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}"[:400])


@contextmanager
def _launched_kernels() -> Iterator[set[str]]:
    """Collect names of launched Triton kernels, to report which path ran."""
    names: set[str] = set()
    try:
        from triton import knobs

        hooks = knobs.runtime.launch_enter_hook
    except (ImportError, AttributeError):
        hooks = None

    def note(metadata: Any) -> None:
        names.add(metadata.get()["name"])

    if hasattr(hooks, "add"):
        hooks.add(note)
    try:
        yield names
    finally:
        if hasattr(hooks, "remove"):
            hooks.remove(note)
