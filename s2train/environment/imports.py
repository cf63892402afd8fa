"""Imports libraries in less time."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import without garbage collection, and exempt all objects from later collections.

    Imported objects stay alive, so that to walk them is wasted time. Use it before tensors exist: an exempt cycle that
    holds one would keep its memory.
    """
    with no_collection():
        yield
        gc.freeze()


@contextmanager
def no_collection() -> Iterator[None]:
    """Pause garbage collection during imports.

    Imports make many objects and no garbage, and collection takes a third of their time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def left_out(*modules: str) -> Iterator[None]:
    """Make imports of these modules raise ModuleNotFoundError.

    For what a library imports if it is installed, and a run doesn't use. Modules that are already imported stay
    available.
    """
    hidden = [module for module in modules if module not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None makes an import fail
    try:
        yield
    finally:
        for module in hidden:
            del sys.modules[module]
