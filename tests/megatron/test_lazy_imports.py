"""Functions that Megatron compiles are compiled when they are first called."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from s2train.megatron import lazy_imports
from s2train.megatron.lazy_imports import compile_on_call


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What torch.compile was called with: (function, options); its graphs run on torch's own kernels."""
    made: list[Any] = []

    def record(model: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        made.append((model.__name__, options))
        return torch.compile(model, backend="eager", fullgraph=True, **options)

    monkeypatch.setattr(lazy_imports, "_compile", record)
    return made


def double(x: torch.Tensor) -> torch.Tensor:
    """Twice x."""
    return x + x


def test_a_function_is_compiled_once_at_its_first_call(compiled: list[Any]) -> None:
    lazy = compile_on_call(double)
    assert (lazy.__name__, lazy.__doc__, compiled) == ("double", "Twice x.", [])
    assert [lazy(torch.ones(())).item(), lazy(torch.zeros(())).item()] == [2, 0]
    assert compiled == [("double", {})]


def test_options_reach_torch_compile(compiled: list[Any]) -> None:
    assert compile_on_call(dynamic=True)(double)(torch.ones(())).item() == 2
    assert compiled == [("double", {"dynamic": True})]


def test_a_method_gets_its_object(compiled: list[Any]) -> None:
    class Scale:
        factor = 3.0

        @compile_on_call
        def times(self, x: torch.Tensor) -> torch.Tensor:
            return self.factor * x

    assert Scale().times(torch.ones(())).item() == 3
    assert compiled == [("times", {})]


def test_what_is_compiled_takes_in_a_function_that_waits_for_its_first_call(compiled: list[Any]) -> None:
    inner = compile_on_call(double)

    @compile_on_call
    def twice(x: torch.Tensor) -> torch.Tensor:
        return inner(inner(x))

    assert twice(torch.ones(())).item() == 4  # as one graph, or `fullgraph` would raise
    assert compiled[-1] == ("twice", {})
