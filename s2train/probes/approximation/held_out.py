"""Reads held-out sequences of a run's data."""

from dataclasses import replace

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from s2train.config import DataConfig
from s2train.data.blend import parse_blend
from s2train.data.indexed import read_document_lengths
from s2train.data.parts import held_out_part
from s2train.data.splits import split_documents_range
from s2train.errors import ConfigError


def held_out_sequences(data: DataConfig, prefix: str | None, length: int, count: int) -> Tensor:
    """Read the first `count` sequences of the concatenated held-out documents.

    Args:
        data: the run's data, of which the held-out part is read.
        prefix: a dataset to read all of instead.
    Returns:
        int64 [count, length + 1].
    Raises:
        ConfigError: the data are missing, mock, or too short.
    """
    if prefix is None:
        return _read(held_out_part(data), length, count)
    try:
        return _read(replace(data, path=prefix, split="0,1"), length, count)
    except ConfigError as error:
        if error.setting != "data.path":
            raise
        raise ConfigError("--data", error.value, error.problem, error.remedy) from error


def _read(part: DataConfig, length: int, count: int) -> Tensor:
    blend = parse_blend(part.path)
    if blend.is_mock:
        raise ConfigError("--data", part.path, "holds no text", "Name a prefix that launch/prepare_data.py wrote")
    needed, found = count * (length + 1), []
    for name in blend.prefixes:
        lengths = read_document_lengths(name)
        documents = IndexedDataset(name)
        for number in split_documents_range(part.split, len(lengths))[1]:
            found.append(np.asarray(documents[number], dtype=np.int64))
            if sum(map(len, found)) >= needed:
                return torch.from_numpy(np.concatenate(found)[:needed]).view(count, length + 1)
    there = sum(map(len, found)) // (length + 1)
    problem = f"the held-out documents hold {there} of {length:,} tokens"
    raise ConfigError("--sequences", count, problem, "Set fewer, a shorter --length, or other --data")
