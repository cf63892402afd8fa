"""Checks the optimizer: what is installed, and what works with it."""

from s2train.config import PretrainConfig
from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.kernels.versions import installed_version

PACKAGE = "emerging-optimizers"
_FIRST = (0, 19)  # megatron-core that builds these optimizers from the package
_INSTALL = f"Use Python 3.12 or later, and pip install megatron-core==0.19.2 {PACKAGE}; or set optim.name=adam."
# Beginnings of the names that each optimizer's settings have in Megatron's OptimizerConfig.
_OPTIONS: dict[str, tuple[str, ...]] = {"adam": (), "sgd": ("sgd_",), "muon": ("muon_",)}
EMERGING = ("muon",)


def check_optimizer(cfg: PretrainConfig) -> None:
    """Check the optimizer's settings, and that its library is installed.

    Raises:
        ConfigError: the package or Megatron's version lacks it, or a setting doesn't go with it.
    """
    optim = cfg.optim
    if optim.name in EMERGING:
        _check_installed(optim.name)
    if optim.name != "adam" and cfg.parallel.distributed_optimizer:
        problem = f"Megatron's distributed optimizer divides only Adam's state, and optim.name={optim.name}"
        raise ConfigError("parallel.distributed_optimizer", True, problem, "Set parallel.distributed_optimizer=false.")
    for name, value in optim.options.items():
        if not name.startswith(_OPTIONS[optim.name]):
            begin = " or ".join(_OPTIONS[optim.name])
            remedy = f"Names begin with {begin}." if begin else "adam takes none: see the other settings of optim."
            raise ConfigError(f"optim.options.{name}", value, f"is no setting of optim.name={optim.name}", remedy)
    _check_muon_heads(cfg)
    if not 0 <= optim.cpu_offload <= 1:
        raise ConfigError("optim.cpu_offload", optim.cpu_offload, "is a share", "Set it to 0 … 1.")
    if not optim.cpu_offload:
        return
    if optim.name != "adam":
        problem = f"only adam's state can be offloaded, and optim.name={optim.name}"
        raise ConfigError("optim.cpu_offload", optim.cpu_offload, problem, "Set optim.cpu_offload=0.")
    if cfg.train.precision != "bf16":
        problem = f"Megatron can't resume it with train.precision={cfg.train.precision}"
        raise ConfigError("optim.cpu_offload", optim.cpu_offload, problem, "Set train.precision=bf16, or 0 here.")
    if not cfg.parallel.distributed_optimizer:
        problem = "Megatron offloads only the distributed optimizer's state"
        raise ConfigError(
            "optim.cpu_offload", optim.cpu_offload, problem, "Set parallel.distributed_optimizer=true, or 0 here."
        )


def check_offload(cfg: PretrainConfig, hardware: Hardware) -> None:
    """Raise ConfigError for an offload from a machine without a GPU."""
    if cfg.optim.cpu_offload and hardware.kind != "cuda":
        problem = "there is no GPU to offload from"
        raise ConfigError("optim.cpu_offload", cfg.optim.cpu_offload, problem, "Set optim.cpu_offload=0.")


def check_offload_library(cfg: PretrainConfig) -> None:
    """Raise ConfigError for an offload without transformer-engine."""
    if cfg.optim.cpu_offload and installed_version("transformer-engine") is None:
        problem = "Megatron offloads only where transformer-engine is installed"
        remedy = "Install the extra `te`, or set optim.cpu_offload=0."
        raise ConfigError("optim.cpu_offload", cfg.optim.cpu_offload, problem, remedy)


def check_options(cfg: PretrainConfig) -> None:
    """Check `optim.options` against Megatron's settings.

    If there are options, this imports Megatron.

    Raises:
        ConfigError: the installed version has no such setting, or a value is of another type or out of range.
    """
    if not cfg.optim.options:
        return
    from megatron.core.optimizer import OptimizerConfig  # slow

    known = OptimizerConfig.__dataclass_fields__
    for name, value in cfg.optim.options.items():
        if name not in known:
            named = ", ".join(each for each in known if each.startswith(_OPTIONS[cfg.optim.name]))
            problem = f"megatron-core {installed_version('megatron-core')} has no such setting"
            raise ConfigError(f"optim.options.{name}", value, problem, f"Set one of {named}.")
        default = known[name].default
        if isinstance(default, bool | int | float | str) and type(value) not in _kinds(default):
            problem = f"it takes a {type(default).__name__}"
            raise ConfigError(f"optim.options.{name}", value, problem, f"Set it, such as {default}.")
        if name.endswith("_momentum") and not 0 <= value < 1:
            remedy = f"Set it, such as {default}."
            raise ConfigError(f"optim.options.{name}", value, "a momentum lies in [0, 1)", remedy)


def _kinds(default: bool | int | float | str) -> tuple[type, ...]:
    return (float, int) if isinstance(default, float) else (type(default),)


def _check_muon_heads(cfg: PretrainConfig) -> None:
    """Reject Muon's split of heads where ranks share KV heads.

    Megatron would leave out the split on such ranks, and note it in its debug log alone.
    """
    tp, groups = cfg.parallel.tp, cfg.model.num_query_groups
    if cfg.optim.name == "muon" and tp > groups and cfg.optim.options.get("muon_split_qkv", True):
        problem = f"muon splits queries, keys and values only on ranks with whole KV heads, of which there are {groups}"
        remedy = f"Set parallel.tp={groups} or less, or '+optim.options.muon_split_qkv=false' under any division."
        raise ConfigError("parallel.tp", tp, problem, remedy)


def _check_installed(name: str) -> None:
    megatron, package = installed_version("megatron-core"), installed_version(PACKAGE)
    if megatron is None or tuple(map(int, megatron.split(".")[:2])) < _FIRST:
        raise ConfigError("optim.name", name, f"megatron-core {megatron} has no {name}", _INSTALL)
    if package is None:
        raise ConfigError("optim.name", name, f"{PACKAGE} is not installed", _INSTALL)
