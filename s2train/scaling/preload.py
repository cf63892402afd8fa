"""Imports what training runs need, before ranks are forked.

Does not initialise CUDA.
"""

from importlib import import_module

from s2train.environment.hardware import without_driver
from s2train.environment.imports import quick_imports
from s2train.megatron.lazy_imports import import_megatron

_MODULES = (
    "s2train.planning",
    "s2train.scaling.balance",
    "s2train.scaling.exactness",
    "s2train.scaling.exchange",
    "s2train.sweeps.plugins",
    "s2train.training.run",
)

with without_driver(), quick_imports():  # a fork's garbage collector would copy what it walks
    import_megatron()
    for _module in _MODULES:
        import_module(_module)
