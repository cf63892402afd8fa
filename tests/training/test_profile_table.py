"""A step's profile table adds up and assigns each kernel or operator to its part."""

from typing import Any

import pytest

from s2train.training.peak_memory import compare_peak
from s2train.training.profile_table import profile_table

GIB = 1 << 30


def event(name: str, cat: str, start: float, dur: float, tid: Any = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": cat, "ts": start, "dur": dur, "tid": tid, "args": args}


def kernel(name: str, launched: float, start: float, dur: float, tid: int = 1) -> list[dict[str, Any]]:
    number = hash((name, launched, start)) % 10**9
    return [
        event("cudaLaunchKernel", "cuda_runtime", launched, 1, tid, correlation=number),
        event(name, "kernel", start, dur, "stream", correlation=number),
    ]


GPU_TRACE = [
    event("ProfilerStep#3", "user_annotation", 0, 10_000),
    event("ProfilerStep#3", "gpu_user_annotation", 5, 8_000, "stream"),
    event("s2train: attention s2 forward", "user_annotation", 100, 50),
    event("s2train: attention s2 backward", "user_annotation", 200, 50, 2),  # the backward's own thread
    event("s2train: optimizer", "user_annotation", 300, 50),
    *kernel("gluon_forward", 110, 1000, 700),
    *kernel("a_gemm_in_attention", 120, 1700, 300),
    *kernel("gluon_backward", 210, 2000, 1500, tid=2),
    *kernel("outside_of_the_range", 210, 3500, 100, tid=1),
    *kernel("nvjet_hsh_128x256", 160, 4000, 2000),
    *kernel("adam", 310, 6000, 500),
    *kernel("ncclDevKernel_ReduceScatter", 320, 6200, 1300),  # 300 of it concurrent with adam
    event("cudaMemcpyAsync", "cuda_runtime", 330, 1, correlation=-2),
    event("Memcpy PtoP (Device -> Device)", "gpu_memcpy", 7500, 400, "stream", correlation=-2),
    *kernel("gemm_of_the_next_step", 10_500, 11_000, 100),
]


def test_a_gpu_trace_is_split_by_ranges_and_names() -> None:
    found = profile_table(GPU_TRACE)
    assert (found.device, found.steps, found.step_ms) == ("cuda", 1, 10.0)
    assert found.parts == pytest.approx(
        {
            "attention s2 forward": 1.0,
            "attention s2 backward": 1.5,
            "norms, elementwise, loss": 0.1,
            "linear layers": 2.0,
            "optimizer": 0.5,
            "communication": 1.4,
            "communication beside compute": 0.3,
            "host": 3.5,
        }
    )


IDLE_TRACE = [
    event("ProfilerStep#3", "user_annotation", 0, 10_000),
    event("aten::mm", "cpu_op", 100, 100),
    event("aten::empty", "cpu_op", 110, 20),  # called by the product
    *kernel("nvjet", 150, 1000, 1000),
    event("autograd::engine::evaluate_function: _SendBackward", "cpu_op", 2500, 600, 2),
    event("aten::index", "cpu_op", 2600, 400, 2),
    *kernel("index_kernel", 2900, 3000, 500, tid=2),
    event("cudaStreamSynchronize", "cuda_runtime", 3100, 450),
    event("aten::add", "cpu_op", 3600, 100),
    *kernel("add", 3650, 4000, 1000),
    event("cudaMemcpyAsync", "cuda_runtime", 4100, 1, correlation=-1),
    event("Memcpy HtoD", "gpu_memcpy", 5200, 100, "stream", correlation=-1),
    *kernel("gemm_of_the_next_step", 10_500, 11_000, 100),
]


def test_idle_time_is_that_before_kernels_by_what_launched_them() -> None:
    found = profile_table(IDLE_TRACE)
    assert found.idle == pytest.approx(
        {"aten::mm": 1.0, "_SendBackward": 1.0, "aten::add after cudaStreamSynchronize": 0.5, "cudaMemcpyAsync": 0.2}
    )
    assert found.parts["host"] == pytest.approx(sum(found.idle.values()) + 4.7)  # after the last kernel
    assert found.format().endswith(
        "the GPU was idle until these had launched, in ms: aten::mm 1.00; _SendBackward 1.00; "
        "aten::add after cudaStreamSynchronize 0.50; cudaMemcpyAsync 0.20"
    )


CPU_TRACE = [
    event("ProfilerStep#3", "user_annotation", 0, 1000),
    event("ProfilerStep#4", "user_annotation", 1000, 1000),
    event("s2train: data", "user_annotation", 0, 100),
    event("aten::to", "cpu_op", 10, 30),
    event("aten::linear", "cpu_op", 100, 300),
    event("aten::mm", "cpu_op", 120, 250),
    event("aten::rms_norm", "cpu_op", 400, 100),
    event("aten::mul", "cpu_op", 420, 60),
    event("s2train: attention dense forward", "user_annotation", 500, 200),
    event("aten::bmm", "cpu_op", 510, 150),
    event("c10d::allreduce_", "cpu_op", 1200, 100),
    event("aten::mm", "cpu_op", 1300, 70, 9),  # another thread's
]


def test_a_cpu_trace_counts_each_operator_once_without_what_it_calls() -> None:
    found = profile_table(CPU_TRACE)
    assert (found.device, found.steps, found.step_ms) == ("cpu", 2, 1.0)
    assert found.parts == pytest.approx(
        {
            "data": 0.015,
            "linear layers": 0.15,
            "norms, elementwise, loss": 0.05,
            "attention dense forward": 0.075,
            "communication": 0.05,
            "host": 0.66,
        }
    )


@pytest.mark.parametrize("trace", [GPU_TRACE, CPU_TRACE], ids=["gpu", "cpu"])
def test_parts_add_up_to_the_step(trace: list[dict[str, Any]]) -> None:
    found = profile_table(trace)
    hidden = found.parts.get("communication beside compute", 0.0)
    assert sum(found.parts.values()) - hidden == pytest.approx(found.step_ms)


def test_the_table_has_the_largest_part_first() -> None:
    lines = profile_table(GPU_TRACE).format().splitlines()
    assert lines[3].split() == ["host", "3.50", "35.0%"]
    assert lines[-2].split() == ["step", "10.00"]


def test_a_trace_without_steps_is_rejected() -> None:
    with pytest.raises(ValueError, match="ProfilerStep"):
        profile_table(CPU_TRACE[2:])


def test_the_peak_is_compared_with_the_plan() -> None:
    assert "planned 10.80 GiB, peak 10.50 (3% below)" in compare_peak(round(10.8 * GIB), round(10.5 * GIB))
    assert "(25% above)" in compare_peak(4 * GIB, 5 * GIB)
    assert "(as planned)" in compare_peak(10_000, 10_004)
