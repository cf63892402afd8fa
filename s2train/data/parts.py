"""Say which data a run trains on, and which it evaluates on."""

import os
from dataclasses import replace

from s2train.config import DataConfig, PretrainConfig
from s2train.data.blend import BUNDLED, MOCK, dataset_prefixes
from s2train.errors import ConfigError

_DEFAULT_SPLIT = DataConfig().split


def training_part(data: DataConfig) -> DataConfig:
    """`data` for training: with `valid_path`, all documents of `path`."""
    return data if data.valid_path is None else replace(data, valid_path=None, split="1")


def held_out_part(data: DataConfig) -> DataConfig:
    """Return `data` with its held-out part alone.

    With `valid_path`, that is all documents there; without it, the held-out weight of `split`.
    """
    return data if data.valid_path is None else replace(data, path=data.valid_path, valid_path=None, split="0,1")


def check_parts(cfg: PretrainConfig) -> None:
    """Check `data.path`, and `data.valid_path` against it and `data.split`; opens no file.

    Raises:
        ConfigError: `data.path` names a dataset twice; `data.valid_path` names no prefixes, or one that the run trains
            on; `data.split` is set too.
    """
    data = cfg.data
    trained_on = [_file(prefix) for prefix in dataset_prefixes(data.path)]
    if len(set(trained_on)) < len(trained_on):
        # each entry draws in the same order, so that samples would repeat before others are drawn once
        raise ConfigError("data.path", data.path, "names a dataset twice", "Name it once, with the sum of its weights")
    if data.valid_path is None:
        return
    remedy = "Set data.valid_path to a prefix that launch/prepare_data.py wrote, or null to hold out by data.split"
    names = data.valid_path if isinstance(data.valid_path, list | tuple) else [data.valid_path]
    if BUNDLED in names or MOCK in names:
        raise ConfigError("data.valid_path", data.valid_path, "takes prefixes of datasets only", remedy)
    try:
        held_out = dataset_prefixes(data.valid_path)
    except ConfigError as error:
        raise ConfigError("data.valid_path", data.valid_path, "is no prefix and no list of prefixes", remedy) from error
    if data.split != _DEFAULT_SPLIT:
        problem = "divides data.path, all of which is for training with data.valid_path"
        raise ConfigError("data.split", data.split, problem, "Leave data.split or data.valid_path out")
    if shared := [prefix for prefix in held_out if _file(prefix) in trained_on]:
        raise ConfigError("data.valid_path", data.valid_path, f"the run trains on {shared[0]} too", remedy)


def _file(prefix: str) -> str:
    """Return a dataset's token file, the same for every spelling of `prefix`."""
    return os.path.realpath(f"{prefix}.bin")
