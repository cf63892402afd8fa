"""Hydra's way to the launchers."""

import sys
from types import ModuleType

from hydra.core.plugins import Plugins

from s2train.sweeps.local import LocalLauncher
from s2train.sweeps.slurm import SlurmLauncher

PACKAGE = "hydra_plugins"  # Hydra takes plugins of this namespace package only


def register() -> None:
    """Make the launchers known to Hydra; before `hydra.main`, and needing no installation."""
    plugins = Plugins.instance()  # has looked for installed ones: the namespace is there if there are any
    module = ModuleType(f"{PACKAGE}.s2train")
    for launcher in (LocalLauncher, SlurmLauncher):
        launcher.__module__ = module.__name__
        vars(module)[launcher.__name__] = launcher
        plugins.register(launcher)
    sys.modules[module.__name__] = module
    package = sys.modules.setdefault(PACKAGE, ModuleType(PACKAGE))
    vars(package)["s2train"] = module
