"""Launches past Triton's own: the same descriptors, the same arguments, one compilation a key."""

from typing import Any

import pytest
import torch
from s2train.kernels import launch as module
from s2train.kernels.hopper.descriptors import descriptor
from s2train.kernels.launch import Launcher, launch
from triton import knobs
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

DEVICE = torch.device("cuda", 1)
SWIZZLED = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


class Compiled:
    """A compiled kernel that notes how it was launched."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.runs: list[tuple[Any, ...]] = []

    def run(self, *arguments: Any) -> None:
        self.runs.append(arguments)

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.runs.append(("watched", grid, *arguments))


class Kernel:
    def __init__(self) -> None:
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def compile_and_run(*arguments: Any, **options: int) -> Compiled:
            self.compiled.append(Compiled())
            self.compiled[-1].runs.append((grid, arguments, options))
            return self.compiled[-1]

        return compile_and_run


@pytest.fixture(autouse=True)
def device_1(monkeypatch: pytest.MonkeyPatch) -> None:
    class Active:
        @staticmethod
        def get_current_stream(index: int) -> str:
            return f"stream of {index}"

    class Driver:
        active = Active()

    monkeypatch.setattr(module, "driver", Driver())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


def test_a_descriptor_is_tritons() -> None:
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    given = (x, [8, 64], [64, 1], [8, 64], SWIZZLED)
    made, expected = descriptor(*given), TensorDescriptor(*given)
    assert type(made) is TensorDescriptor
    assert vars(made) == vars(expected)


def test_a_kernel_is_compiled_once_a_key_and_launched_each_time() -> None:
    kernel, cache = Kernel(), {}  # type: ignore[var-annotated]
    for key, argument in (("a", 1), ("a", 2), ("b", 3), ("a", 4)):
        launch(kernel, (7, 2, 1), (argument, "x"), cache=cache, key=key, device=DEVICE, num_warps=4)
    first, second = kernel.compiled
    assert cache == {"a": first, "b": second}
    assert first.runs[0] == ((7, 2, 1), (1, "x"), {"num_warps": 4})
    prefix = (7, 2, 1, "stream of 1", "function", "metadata", None, None, None)
    assert first.runs[1:] == [(*prefix, 2, "x"), (*prefix, 4, "x")]
    assert len(second.runs) == 1


def test_a_launcher_compiles_for_each_dtype_alignment_number_and_option() -> None:
    kernel, memory = Kernel(), torch.zeros(64)
    launcher = Launcher(kernel)
    even, odd, integers = memory[4:], memory[1:], memory.view(torch.int32)
    for tensor, number, warps in (
        (even, 1, 4), (memory, 1, 4), (odd, 1, 4), (integers, 1, 4), (even, 2, 4), (even, 1, 8)
    ):  # fmt: skip
        launcher((7, 1, 1), (tensor, number), num_warps=warps)
    assert [len(compiled.runs) for compiled in kernel.compiled] == [2, 1, 1, 1, 1]
    given = kernel.compiled[0].runs[1]
    assert given[-2] is memory


def test_a_profiler_sees_every_launch() -> None:
    kernel, cache = Kernel(), {}  # type: ignore[var-annotated]
    launch(kernel, (7, 2, 1), (1,), cache=cache, key="a", device=DEVICE)
    watch = lambda metadata: None  # noqa: E731
    knobs.runtime.launch_enter_hook.add(watch)
    try:
        launch(kernel, (7, 2, 1), (2,), cache=cache, key="a", device=DEVICE)
    finally:
        knobs.runtime.launch_enter_hook.remove(watch)
    assert kernel.compiled[0].runs[1:] == [("watched", (7, 2, 1), 2)]


def test_another_current_device_is_left_for_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.device.index

        def __exit__(self, *error: object) -> None:
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Device)
    compiled = Compiled()
    launched_on: list[int] = []
    monkeypatch.setattr(compiled, "run", lambda *arguments: launched_on.append(current[0]))
    launch(Kernel(), (7, 2, 1), (1,), cache={"a": compiled}, key="a", device=DEVICE)
    assert launched_on == [1]
    assert current == [0]
