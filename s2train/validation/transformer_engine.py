"""Checks `layer_backend` and FP8: transformer-engine, the GPU, and sizes of FP8 GEMMs."""

import torch

from s2train.config import PretrainConfig, head_dim
from s2train.environment.hardware import Hardware
from s2train.environment.transformer_engine import INSTALL, te_problem
from s2train.errors import ConfigError

# Least compute capability for each recipe.
_CAPABILITY = {"tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
_BLOCKWISE_CUDA = (12, 9)


def check_te(cfg: PretrainConfig, hardware: Hardware) -> None:
    """Check that `layer_backend` and `fp8` work on `hardware` with the installed libraries.

    Raises:
        ConfigError: transformer-engine is required, explicitly or by `fp8`, and is missing or broken; the GPU has no
            FP8; or FP8 GEMMs don't support a dimension.
    """
    wants_fp8 = cfg.fp8 != "none"
    if wants_fp8:
        check_fp8_settings(cfg)
    if not wants_fp8 and cfg.layer_backend != "te":
        return
    setting, value = ("layer_backend", cfg.layer_backend) if cfg.layer_backend == "te" else ("fp8", cfg.fp8)
    if hardware.kind != "cuda":
        raise ConfigError(setting, value, "transformer-engine needs a CUDA device", "Set layer_backend=local fp8=none")
    if wants_fp8:
        _check_capability(cfg, hardware)
        if cfg.fp8_recipe == "blockwise":
            _check_cuda(torch.version.cuda)
    if (problem := te_problem()) is not None:
        raise ConfigError(setting, value, problem, INSTALL + (" fp8=none" if wants_fp8 else ""))


def check_target(cfg: PretrainConfig, hardware: Hardware) -> None:
    """Check `layer_backend` and `fp8` for a planned GPU.

    Installed libraries don't matter.

    Raises:
        ConfigError: settings that transformer-engine or FP8 doesn't support, or a GPU without FP8.
    """
    if cfg.fp8 != "none":
        check_fp8_settings(cfg)
        _check_capability(cfg, hardware)


def check_fp8_settings(cfg: PretrainConfig) -> None:
    """Check that the other settings are compatible with FP8, on any machine.

    Raises:
        ConfigError: a layer backend, precision or GEMM dimension that FP8 doesn't support.
    """
    if cfg.layer_backend == "local":
        raise ConfigError("fp8", cfg.fp8, "layer_backend=local has no FP8 layers", "Set layer_backend=te, or fp8=none")
    if cfg.train.precision != "bf16":
        problem = f"it requires train.precision=bf16, not {cfg.train.precision}"
        raise ConfigError("fp8", cfg.fp8, problem, "Set train.precision=bf16, or fp8=none")
    model, parallel = cfg.model, cfg.parallel
    unit = 32 if cfg.fp8_recipe == "mxfp8" else 16  # every dimension of FP8 GEMMs is a multiple of it
    heads, groups = model.num_attention_heads, model.num_query_groups
    tokens = cfg.train.seq_length * cfg.train.micro_batch_size // parallel.cp
    sizes = {
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size": model.ffn_hidden_size // parallel.tp,
        "model.head_dim": (heads + 2 * groups) * head_dim(model) // parallel.tp,
        "train.seq_length": tokens // (parallel.tp if parallel.sequence_parallel else 1),
    }
    for setting, size in sizes.items():
        if size % unit:
            problem = f"{setting} gives a rank's GEMMs a dimension of {size}, which is not a multiple of {unit}"
            raise ConfigError("fp8", cfg.fp8, problem, f"Change {setting}, or set fp8=none")


def _check_capability(cfg: PretrainConfig, hardware: Hardware) -> None:
    least = _CAPABILITY[cfg.fp8_recipe]
    if hardware.capability is not None and hardware.capability < least:
        raise ConfigError(
            "fp8" if hardware.capability < _CAPABILITY["tensorwise"] else "fp8_recipe",
            cfg.fp8 if hardware.capability < _CAPABILITY["tensorwise"] else cfg.fp8_recipe,
            f"{hardware.name} has compute capability {_version(hardware.capability)}, below {_version(least)}",
            "Set fp8=none" if hardware.capability < _CAPABILITY["tensorwise"] else "Set fp8_recipe=tensorwise",
        )


def _check_cuda(version: str | None) -> None:
    if version is not None and tuple(map(int, version.split(".")[:2])) < _BLOCKWISE_CUDA:
        problem = f"it needs CUDA {_version(_BLOCKWISE_CUDA)}, and this torch was built with {version}"
        raise ConfigError("fp8_recipe", "blockwise", problem, "Set fp8_recipe=tensorwise")


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
