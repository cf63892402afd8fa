"""Checks kernels of dense layers, elementwise operations and loss."""

import torch

from s2train.attention.hybrid import HybridLayout
from s2train.config import PretrainConfig
from s2train.costs.parameters import head_dim
from s2train.environment.hardware import Hardware
from s2train.environment.liger import INSTALL as LIGER
from s2train.environment.liger import choose_loss, liger_operations, liger_problem
from s2train.environment.transformer_engine import uses_te
from s2train.errors import ConfigError
from s2train.kernels.dense_choice import takes_fa4
from s2train.kernels.flash4 import INSTALL as FA4
from s2train.kernels.flash4 import fa4_problem, fa4_unsupported_reason

_OF_TORCH = ("cudnn", "flash", "efficient")


def check_kernel_settings(cfg: PretrainConfig, hybrid: HybridLayout) -> None:
    """Check explicit `dense_attention` and `loss` against other settings, on any machine.

    Raises:
        ConfigError: the kernels don't support the run's dense layers or its loss.
    """
    if cfg.loss == "linear" and cfg.parallel.tp > 1:
        problem = f"parallel.tp={cfg.parallel.tp} splits the output layer, which it needs whole"
        raise ConfigError("loss", cfg.loss, problem, "Set loss=liger, or parallel.tp=1.")
    name = cfg.dense_attention
    if name == "auto" or not any(layer.is_dense for layer in hybrid.layers):
        return
    if name in _OF_TORCH and cfg.data.attention_within_documents:
        problem = "torch's kernels don't support packed documents (data.attention_within_documents=true)"
        _reject_dense(cfg, problem, "Set dense_attention=auto, fa4 or s2train.")
    if name == "cudnn" and cfg.train.deterministic:
        _reject_dense(
            cfg,
            "torch has no deterministic backward of cuDNN's attention",
            "Set dense_attention=auto, or train.deterministic=false.",
        )
    if name == "cudnn" and cfg.parallel.cp > 1:
        problem = f"parallel.cp={cfg.parallel.cp} gives a rank fewer queries than keys, which cuDNN does not support"
        _reject_dense(cfg, problem, "Set dense_attention=auto.")
    if name in ("fa4", "cudnn", "flash") and cfg.train.precision == "fp32":
        _reject_dense(cfg, "it does not support fp32", "Set dense_attention=auto, or train.precision=bf16.")
    grouped = cfg.model.num_query_groups < cfg.model.num_attention_heads
    if name == "efficient" and grouped and cfg.train.precision == "bf16":
        problem = f"it does not support grouped heads, and model.num_query_groups={cfg.model.num_query_groups}"
        _reject_dense(cfg, problem, "Set dense_attention=auto.")


def check_libraries(cfg: PretrainConfig, hybrid: HybridLayout, hardware: Hardware) -> None:
    """Import FlashAttention-4 and Liger-Kernel if used; check that they work.

    Raises:
        ConfigError: an explicitly set library has no GPU, is not installed, or doesn't support the call; or `auto`
            would select a library whose import fails: other ranks would run other kernels.
    """
    _check_liger(cfg, hardware)
    if not any(layer.is_dense for layer in hybrid.layers):
        return
    if cfg.dense_attention == "fa4":
        check_fa4_serves(cfg, hybrid, hardware)
        if (problem := fa4_problem()) is not None:
            _reject_dense(cfg, problem, f"{FA4}, or set dense_attention=auto.")
    elif cfg.dense_attention == "auto" and _takes_fa4(cfg, hardware) and (problem := fa4_problem()) is not None:
        _reject_dense(cfg, problem, "Repair or uninstall it, or set dense_attention=s2train.")


def check_fa4_serves(cfg: PretrainConfig, hybrid: HybridLayout, hardware: Hardware) -> None:
    """Check that dense_attention=fa4 supports GPU and heads, installed or not.

    Raises:
        ConfigError: it does not.
    """
    if cfg.dense_attention != "fa4" or not any(layer.is_dense for layer in hybrid.layers):
        return
    if hardware.kind != "cuda":
        _reject_dense(cfg, "it needs a CUDA device", "Set dense_attention=auto.")
    if hardware.capability is None:
        return
    why = fa4_unsupported_reason(hardware.capability, _dtype(cfg), head_dim(cfg.model))
    if why is not None:
        _reject_dense(cfg, why, "Set dense_attention=auto.")


def _takes_fa4(cfg: PretrainConfig, hardware: Hardware) -> bool:
    return hardware.kind == "cuda" and takes_fa4(
        hardware.capability,
        _dtype(cfg),
        head_dim(cfg.model),
        grouped=cfg.model.num_query_groups < cfg.model.num_attention_heads,
        deterministic=cfg.train.deterministic,
    )


def _check_liger(cfg: PretrainConfig, hardware: Hardware) -> None:
    te = uses_te(cfg, hardware)
    uses = {
        "elementwise": (cfg.elementwise, bool(liger_operations(cfg, hardware.capability, te))),
        "loss": (cfg.loss, choose_loss(cfg, hardware.capability, te) != "torch"),
    }
    for setting, (value, used) in sorted(uses.items(), key=lambda use: use[1][0] == "auto"):  # explicit values first
        if not used:
            continue
        if hardware.kind != "cuda":
            raise ConfigError(setting, value, "Liger-Kernel needs a CUDA device", f"Set {setting}=auto.")
        if (problem := liger_problem()) is not None:
            raise ConfigError(setting, value, problem, f"{LIGER}, or set {setting}=torch.")


def _dtype(cfg: PretrainConfig) -> torch.dtype:
    return torch.bfloat16 if cfg.train.precision == "bf16" else torch.float32


def _reject_dense(cfg: PretrainConfig, problem: str, remedy: str) -> None:
    raise ConfigError("dense_attention", cfg.dense_attention, problem, remedy)
