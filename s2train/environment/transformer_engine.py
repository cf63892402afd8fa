"""Checks whether transformer-engine is installed and works."""

import importlib
import warnings
from functools import cache

import torch

from s2train.config import PretrainConfig
from s2train.environment.hardware import Hardware
from s2train.errors import message_line

INSTALL = (
    "pip install 'transformer-engine[pytorch]' (it needs CUDA and builds against your torch),"
    " or set layer_backend=local"
)


@cache
def te_problem() -> str | None:
    """Import transformer-engine; explain why it can't be used, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("transformer_engine.pytorch")
    except ModuleNotFoundError as error:
        if error.name == "transformer_engine":
            return "transformer-engine is not installed"
        return f"transformer-engine is installed without its module {error.name}"
    # no CUDA, wrong torch version, missing library
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        return f"transformer-engine can't be imported ({message_line(error)})"
    return None


def uses_te_here(name: str) -> bool:
    """Whether `layer_backend=name` means transformer-engine here; `auto` does if it works."""
    return name == "te" or (name == "auto" and torch.cuda.is_available() and te_problem() is None)


def uses_te(cfg: PretrainConfig, hardware: Hardware) -> bool:
    """Whether the run's layers are transformer-engine's.

    `layer_backend=auto` selects them only for this machine's GPU.
    """
    if cfg.layer_backend == "auto" and cfg.fp8 == "none":
        return hardware.kind == "cuda" and cfg.plan.device is None and uses_te_here("auto")
    return cfg.layer_backend != "local"
