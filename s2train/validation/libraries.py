"""Checks kernels of dense layers, elementwise operations and loss."""

from s2train.attention.hybrid import HybridLayout
from s2train.config import PretrainConfig, head_dim
from s2train.environment import liger
from s2train.environment.dtypes import DTYPES
from s2train.environment.hardware import Hardware
from s2train.environment.imports import quick_imports
from s2train.environment.liger import choose_loss, liger_operations, liger_problem
from s2train.environment.transformer_engine import uses_te
from s2train.errors import ConfigError
from s2train.kernels import flash4
from s2train.kernels.dense_choice import takes_fa4
from s2train.kernels.flash4 import fa4_problem, fa4_unsupported_reason
from s2train.kernels.versions import installed_version

_REPAIR = "Repair or uninstall it, or set dense_attention=s2train."
_OF_TORCH = ("cudnn", "flash", "efficient")


def check_kernel_settings(cfg: PretrainConfig, hybrid: HybridLayout) -> None:
    """Check explicit `dense_attention` and `loss` against other settings, on any machine.

    Raises:
        ConfigError: the kernels don't support the run's dense layers or its loss.
    """
    if cfg.loss in liger.WITHOUT_TP and cfg.parallel.tp > 1:
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
    """Check that FlashAttention-4 and Liger-Kernel are installed, if used.

    Imports neither: on some machines that takes most of a run's plan. `import_libraries` does.

    Raises:
        ConfigError: an explicitly set library has no GPU, is not installed, or doesn't support the call.
    """
    for setting, value in _liger_settings(cfg, hardware):
        if hardware.kind != "cuda":
            raise ConfigError(setting, value, "Liger-Kernel needs a CUDA device", f"Set {setting}=auto.")
        if installed_version(liger.PACKAGE) is None:
            _reject_liger(setting, value, f"{liger.PACKAGE} is not installed")
    if cfg.loss == "in_place" and (release := installed_version(liger.PACKAGE)) != liger.RELEASE:
        problem = f"it launches a kernel of {liger.PACKAGE} {liger.RELEASE}, and {release} is installed"
        raise ConfigError(
            "loss", cfg.loss, problem, f"pip install {liger.PACKAGE}=={liger.RELEASE}, or set loss=liger."
        )
    check_fa4_serves(cfg, hybrid, hardware)
    if uses_fa4(cfg, hybrid, hardware) and installed_version(flash4.PACKAGE) is None:
        _reject_fa4(cfg, f"{flash4.PACKAGE} is not installed")


def import_libraries(cfg: PretrainConfig, hybrid: HybridLayout, hardware: Hardware) -> None:
    """Import FlashAttention-4 and Liger-Kernel, if used.

    Call it before the process group exists.

    Raises:
        ConfigError: an import fails. `auto` selects no other kernels then: other ranks would not.
    """
    with quick_imports():
        for setting, value in _liger_settings(cfg, hardware):
            if (problem := liger_problem()) is not None:
                _reject_liger(setting, value, problem)
        if uses_fa4(cfg, hybrid, hardware) and (problem := fa4_problem()) is not None:
            _reject_fa4(cfg, problem)


def uses_fa4(cfg: PretrainConfig, hybrid: HybridLayout, hardware: Hardware) -> bool:
    """Return whether FlashAttention-4 computes some dense layers; imports nothing."""
    if not any(layer.is_dense for layer in hybrid.layers):
        return False
    return cfg.dense_attention == "fa4" or (cfg.dense_attention == "auto" and _takes_fa4(cfg, hardware))


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
    why = fa4_unsupported_reason(hardware.capability, DTYPES[cfg.train.precision], head_dim(cfg.model))
    if why is not None:
        _reject_dense(cfg, why, "Set dense_attention=auto.")


def _takes_fa4(cfg: PretrainConfig, hardware: Hardware) -> bool:
    return hardware.kind == "cuda" and takes_fa4(
        hardware.capability,
        DTYPES[cfg.train.precision],
        head_dim(cfg.model),
        grouped=cfg.model.num_query_groups < cfg.model.num_attention_heads,
        deterministic=cfg.train.deterministic,
    )


def _liger_settings(cfg: PretrainConfig, hardware: Hardware) -> list[tuple[str, str]]:
    """Return the settings that use Liger-Kernel, with their values, explicit ones first."""
    te = uses_te(cfg, hardware)
    used = [("elementwise", cfg.elementwise)] if liger_operations(cfg, hardware.capability, te) else []
    if choose_loss(cfg, hardware.capability, te) != "torch":
        used.append(("loss", cfg.loss))
    return sorted(used, key=lambda use: use[1] == "auto")


def _reject_dense(cfg: PretrainConfig, problem: str, remedy: str) -> None:
    raise ConfigError("dense_attention", cfg.dense_attention, problem, remedy)


def _reject_fa4(cfg: PretrainConfig, problem: str) -> None:
    by_name = cfg.dense_attention == "fa4"
    remedy = f"{flash4.INSTALL}, or set dense_attention=auto." if by_name else _REPAIR
    _reject_dense(cfg, problem, remedy)


def _reject_liger(setting: str, value: str, problem: str) -> None:
    raise ConfigError(setting, value, problem, f"{liger.INSTALL}, or set {setting}=torch.")
