"""Whether wandb can be written to."""

from s2train.errors import ConfigError

_MODES = ("disabled", "offline", "online")


def check_wandb(setting: str, mode: str) -> None:
    """Refuse `online` without an account, before anything is built.

    Raises:
        ConfigError: no such mode; wandb has no API key, or is not installed.
    """
    if mode not in _MODES:
        raise ConfigError(setting, mode, "no such mode", f"Set one of {', '.join(_MODES)}")
    if mode == "disabled":
        return
    remedy = f"Set {setting}=offline, or disabled; files in the run folder hold the same always"
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(setting, mode, f"wandb can't be imported ({error})", remedy) from error
    if mode == "online" and not wandb.login(prompt=False):
        raise ConfigError(setting, mode, "no API key is configured", f"wandb login. {remedy}")
