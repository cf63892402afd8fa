"""Import Megatron without modules that a run needs later or never.

These make up half of all modules, and half of the import time.
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from s2train.environment.imports import left_out, no_collection, quick_imports

# Megatron imports these if they are installed: its inference engine logs to wandb, and its timers name TensorBoard's
# writer (170 modules). A run that uses them imports them itself.
_OPTIONAL = ("wandb", "torch.utils.tensorboard")
# Megatron's inference engine imports it if installed, with 420 modules. A run imports it only if its layers use it.
_FA4 = "flash_attn.cute"
_compile = torch.compile


def import_megatron() -> None:
    """Import megatron.core; call this once, before any other Megatron import.

    While its modules are imported, Megatron decorates some 50 functions with torch.compile. That imports dynamo and
    inductor (800 modules), although nothing is compiled before a call. Here these imports wait for the first call of
    such a function, which never happens in a run on a CPU or one whose activations don't use torch.compile.
    """
    if "megatron.core" in sys.modules:
        return
    # A run compiles a few small functions. By default inductor would start a pool of processes for them, one per core,
    # on every rank.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # transformer-engine, which Megatron imports if installed, may need FlashAttention-4 itself.
    unused = _OPTIONAL if find_spec("transformer_engine") else (*_OPTIONAL, _FA4)
    torch.compile = compile_on_call
    try:
        with left_out(*unused), quick_imports():
            importlib.import_module("megatron.core")  # its `jit_fuser` binds `compile_on_call` for later modules
            importlib.import_module("megatron.core.timers")
            importlib.import_module("megatron.core.transformer.attention")  # tries to import FlashAttention-4
            importlib.import_module("torch._dynamo")  # torch's optimizers import it when constructed
    finally:
        torch.compile = _compile


def compile_on_call(model: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compile a function with torch.compile at its first call.

    Nothing is imported before that call.

    Args:
        model: a function; anything else is compiled at once. None: return a decorator.
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
            with no_collection():  # imports the compiler
                compiled.append(_compile(model, **options))
        return compiled[0](*arguments, **named)

    call._torchdynamo_inline = model  # type: ignore[attr-defined]  # as torch.compile does, for calls in compiled code
    return call
