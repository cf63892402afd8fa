"""Importing Megatron without what a run needs later, or never: half of all modules, and of the time."""

import functools
import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Megatron's inference engine logs to it if it is there. A run imports it in a thread of its own (s2train/wandb_run.py).
_OPTIONAL = ("wandb",)
_compile = torch.compile


def import_megatron() -> None:
    """Import megatron.core; before anything else of Megatron, and once.

    Megatron compiles some 50 functions as its modules are imported, by torch.compile, which imports dynamo and
    inductor (800 modules) though nothing is compiled before a call. Here that waits for the first call: a run on a CPU,
    or one whose activations are not torch.compile's, never makes it.
    """
    if "megatron.core" in sys.modules:
        return
    # A run compiles a handful of small functions. Inductor would start a pool of processes for them, one a core, on
    # every rank.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.compile = compile_on_call
    try:
        with _left_out(_OPTIONAL), _no_collection():
            importlib.import_module("megatron.core")  # its `jit_fuser` keeps `compile_on_call` for later modules
            importlib.import_module("megatron.core.timers")
            importlib.import_module("torch._dynamo")  # torch's optimizers import it when they are made
    finally:
        torch.compile = _compile


def compile_on_call(model: Callable[..., Any] | None = None, **options: Any) -> Any:
    """torch.compile of a function, of which nothing is imported before the function's first call.

    Args:
        model: a function; anything else is compiled at once. None: returns a decorator.
        options: torch.compile's.
    """
    if model is None:
        return functools.partial(compile_on_call, **options)
    if not hasattr(model, "__code__"):
        return _compile(model, **options)
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(model)
    def call(*arguments: Any, **named: Any) -> Any:
        if not compiled:
            with _no_collection():  # it imports the compiler
                compiled.append(_compile(model, **options))
        return compiled[0](*arguments, **named)

    call._torchdynamo_inline = model  # type: ignore[attr-defined]  # as torch.compile does, for calls in what it compiles
    return call


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause garbage collection: imports make many objects and no garbage, and it takes a third of their time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _left_out(packages: tuple[str, ...]) -> Iterator[None]:
    """Have imports of these packages raise ModuleNotFoundError, but for those that are imported already."""
    hidden = [package for package in packages if package not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: not to be found
    try:
        yield
    finally:
        for package in hidden:
            del sys.modules[package]
