"""Registers the launchers with Hydra."""

import sys
from types import ModuleType

from hydra.core.plugins import Plugins

from s2train.sweeps.local import LocalLauncher
from s2train.sweeps.slurm import SlurmLauncher

PACKAGE = "hydra_plugins"  # Hydra accepts plugins only from this namespace package


def register() -> None:
    """Register the launchers with Hydra without installing them; call before `hydra.main`."""
    plugins = Plugins.instance()  # scans for installed plugins, so the namespace exists if there are any
    module = ModuleType(f"{PACKAGE}.s2train")
    for launcher in (LocalLauncher, SlurmLauncher):
        launcher.__module__ = module.__name__
        vars(module)[launcher.__name__] = launcher
        plugins.register(launcher)
    sys.modules[module.__name__] = module
    package = sys.modules.setdefault(PACKAGE, ModuleType(PACKAGE))
    vars(package)["s2train"] = module
