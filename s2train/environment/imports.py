"""Imports libraries in less time."""

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import without garbage collection, and exempt all objects from later collections.

    Imported objects stay alive, so that to walk them is wasted time. Use it before tensors exist: an exempt cycle that
    holds one would keep its memory.
    """
    with no_collection():
        yield
        gc.freeze()
    atexit.unregister(thaw)
    atexit.register(thaw)


def thaw() -> None:
    """End the exemption from collection, where Triton would list the exempt.

    Triton 3.9 and later print 30 lines of what is left of their module after a process's last collection, which
    takes half a second more.
    """
    triton = sys.modules.get("triton")
    if triton is not None and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
        gc.unfreeze()


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


@dataclass(frozen=True)
class Modules:
    """Number of imported modules, and of those without byte code.

    Each start compiles the latter, which takes several times as long as to read byte code.
    """

    modules: int
    without_byte_code: int

    def advice(self) -> str | None:
        """Return what to do about missing byte code.

        None if less than a tenth of the modules lacks it.
        """
        if 10 * self.without_byte_code < self.modules:
            return None
        return (
            f"{self.without_byte_code:,} of {self.modules:,} modules have no byte code, so that each start compiles"
            " them. Unset PYTHONDONTWRITEBYTECODE, or run python -m compileall on the folders of packages"
        )


def imported_modules() -> Modules:
    """Count this process's modules."""
    modules = list(sys.modules.values())
    specs = [getattr(module, "__spec__", None) for module in modules]
    files = [spec.cached for spec in specs if spec is not None and spec.has_location and spec.cached]
    return Modules(len(modules), sum(not os.path.exists(file) for file in files))
