"""Whether transformer-engine is there and works."""

import importlib
import warnings
from functools import cache

import torch

from s2train.config import PretrainConfig
from s2train.environment.hardware import Hardware

INSTALL = (
    "pip install 'transformer-engine[pytorch]' (it needs CUDA and builds against your torch),"
    " or set layer_backend=local"
)


@cache
def te_problem() -> str | None:
    """Why transformer-engine's layers can't be used, None if they can; imports them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("transformer_engine.pytorch")
    except ModuleNotFoundError as error:
        if error.name == "transformer_engine":
            return "transformer-engine is not installed"
        return f"transformer-engine is installed without its part {error.name}"
    except (ImportError, RuntimeError, OSError, AttributeError) as error:  # no CUDA, another torch, missing library
        return f"transformer-engine can't be imported ({_first_line(error)})"
    return None


def uses_te_here(name: str) -> bool:
    """Whether `layer_backend=name` means transformer-engine's layers on this machine; `auto` does where they work."""
    return name == "te" or (name == "auto" and torch.cuda.is_available() and te_problem() is None)


def uses_te(cfg: PretrainConfig, hardware: Hardware) -> bool:
    """Whether layers are transformer-engine's; `layer_backend=auto` takes them for this machine's GPU alone."""
    if cfg.layer_backend == "auto" and cfg.fp8 == "none":
        return hardware.kind == "cuda" and cfg.plan.device is None and uses_te_here("auto")
    return cfg.layer_backend != "local"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
