"""What every test shares."""

import gc
import os
from collections.abc import Generator
from typing import Any

import pytest
import torch
from hypothesis import settings

from s2train.megatron.lazy_imports import compile_on_call
from tests.quick_hydra import quicken

# Triton reads this at its first import, which megatron-core may do before the kernels' own tests are reached.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Groups of tests that wait most of their time, for timeouts and other processes: they begin first, in this order.
# Each has a file, which one worker runs (tests/scheduling.py), so that the others use the cores meanwhile.
_GROUPS_THAT_WAIT = {"faults": 0, "kills": 1, "nodes": 2, "sweeps": 3}

# Time limits on examples fail by the machine's load, not by the code.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

quicken()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that take long begin first, so that no worker is left alone with them; GPU tests need a GPU."""
    items.sort(key=lambda item: (_GROUPS_THAT_WAIT.get(_group(item), 9), item.get_closest_marker("slow") is None))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import test modules without compilers, which Megatron would import, and without garbage collection."""
    compile_at_once = torch.compile
    torch.compile = compile_on_call
    gc.disable()
    try:
        return (yield)
    finally:
        torch.compile = compile_at_once
        gc.enable()


def pytest_collection_finish() -> None:
    """Keep imported modules and collected tests from the garbage collector, which would walk them again and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadgroup` groups nothing: pytest 9 keeps node ids where pytest-xdist 3.8 doesn't write them."""
    from tests.scheduling import SharedFixtures  # GPU tests run without pytest-xdist

    return SharedFixtures(config, log)


def _group(item: pytest.Item) -> str:
    mark = item.get_closest_marker("xdist_group")
    return str(mark.args[0]) if mark else ""
