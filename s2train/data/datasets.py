"""Builds a run's training and held-out samples with Megatron's GPTDataset."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from math import ceil
from pathlib import Path

import torch
from filelock import FileLock
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset, MockGPTLowLevelDataset
from torch.utils.data import Dataset

from s2train.config import PretrainConfig
from s2train.data.blend import Blend, parse_blend
from s2train.data.further_epochs import FurtherEpochs, further_epochs, seed_of_epoch
from s2train.data.index_cache import remove_broken_sets
from s2train.data.indexed import read_document_lengths
from s2train.data.parts import held_out_part, training_part
from s2train.data.splits import megatron_split
from s2train.data.tokenizers import Tokenizer

Samples = Dataset | None


def build_datasets(
    cfg: PretrainConfig,
    tokenizer: Tokenizer,
    num_train_samples: int,
    num_valid_samples: int,
    *,
    last_sample: int = 0,
) -> tuple[Samples, Samples]:
    """Build training and held-out samples in a fixed order.

    A dataset may have more samples than requested; a blend has exactly the number requested. A sample is a dict of
    `tokens`, `labels` and `position_ids`, int64 [seq_length], and `loss_mask`, float32 [seq_length]; in a blend also
    `dataset_id`. A sample holds consecutive documents, each closed by the tokenizer's end of document. Small datasets
    are repeated for several epochs. With `data.attention_within_documents`, position ids restart at 0 in each document.

    The order depends on the data (not on their path), `data.split`, `seed` (that of held-out samples on
    `held_out_seed`), `train.seq_length` and the number of samples: Megatron shuffles the epochs that these take
    together. It does not depend on `last_sample`: further epochs follow, each shuffled separately.

    Collective when torch.distributed is initialised (which blends need with megatron-core 0.16): rank 0 builds the
    indices, and the others read them from `data.cache`. Runs that share this folder build one at a time, since Megatron
    would read a file that another run is still writing. Indices that a killed run left incomplete are rebuilt.

    Args:
        tokenizer: tokenizer of the data; call `check_data` first.
        num_train_samples: number of samples that the run began with; it stays the same when the run's length changes.
        last_sample: training samples needed, if more than `num_train_samples`.

    Returns:
        (train, held out). Each is None if `data.split` or the number of samples leaves it out.
    """
    if cfg.data.valid_path is None and cfg.held_out_seed == cfg.seed:
        return _build_parts(cfg, tokenizer, (num_train_samples, num_valid_samples), last_sample)
    train = replace(cfg, data=training_part(cfg.data))
    held_out = replace(cfg, data=held_out_part(cfg.data), seed=cfg.held_out_seed)
    train_set, _ = _build_parts(train, tokenizer, (num_train_samples, 0), last_sample)
    _, held_out_set = _build_parts(held_out, tokenizer, (0, num_valid_samples), 0)
    return train_set, held_out_set


def _build_parts(
    cfg: PretrainConfig, tokenizer: Tokenizer, sizes: tuple[int, int], last_sample: int
) -> tuple[Samples, Samples]:
    """Build both parts of `data.path`, in the order of one seed."""
    blend = parse_blend(cfg.data.path)
    cache = Path(cfg.data.cache)
    with _locked(cache, [cache, *(cache / _cache_name(prefix) for prefix in blend.prefixes)]):
        if blend.is_mock:
            return _build_epochs(cfg, tokenizer, None, sizes, last_sample)
        return _build_blend(cfg, tokenizer, blend, sizes, last_sample)


@contextmanager
def _locked(cache: Path, folders: list[Path]) -> Iterator[None]:
    """Lock `cache` against other runs on rank 0, and remove broken indices.

    The run's other ranks wait for rank 0 in Megatron's barriers.

    Args:
        folders: folders of `cache` from which broken indices are removed.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        yield
        return
    cache.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache / "building.lock")
    with suppress(NotImplementedError):  # the file system has no locks
        lock.acquire()
        for folder in folders:  # only with the lock: without it, another run may still be writing the index
            if removed := remove_broken_sets(folder):
                print(f"{folder}: rebuilding an incomplete index: {removed[0].name}", flush=True)
    try:
        yield
    finally:
        lock.release()


def _build_blend(
    cfg: PretrainConfig,
    tokenizer: Tokenizer,
    blend: Blend,
    sizes: tuple[int, int],
    last_sample: int,
) -> tuple[Samples, Samples]:
    if len(blend.prefixes) == 1:
        return _build_epochs(cfg, tokenizer, blend.prefixes[0], sizes, last_sample)

    # Megatron's own blending requests each dataset's share plus a margin, which can be too few for small numbers of
    # samples. A blend of exactly the number requested takes at most ⌈weight × samples⌉ from a dataset.
    parts = []
    for prefix, weight in zip(blend.prefixes, blend.weights, strict=True):
        shares = (ceil(weight * sizes[0]), ceil(weight * sizes[1]))
        last = ceil(weight * last_sample)
        parts.append(_build_epochs(cfg, tokenizer, prefix, shares, last))
    # Megatron chooses each sample's dataset without looking ahead: a larger blend begins with the smaller one.
    sizes = (max(sizes[0], last_sample), sizes[1])
    config = _config(cfg, tokenizer, blend.prefixes[0], cfg.data.cache, sizes)
    train, valid = (
        BlendedMegatronDatasetBuilder.build_generic_dataset(
            BlendedDataset, _on_every_rank, True, _of_one_class(datasets), list(blend.weights), size, config
        )
        if part is not None  # the same on every rank, as the call is collective
        else None
        for datasets, size, part in zip(zip(*parts, strict=True), sizes, config.split_matrix, strict=False)
    )
    return train, valid


def _of_one_class(datasets: tuple[Samples, ...]) -> list[Samples]:
    """Wrap all datasets of a blend if one has further epochs.

    Megatron only blends datasets of the same class.
    """
    if not any(isinstance(dataset, FurtherEpochs) for dataset in datasets):
        return list(datasets)
    return [dataset if isinstance(dataset, FurtherEpochs) else FurtherEpochs([dataset]) for dataset in datasets]


def _build_epochs(
    cfg: PretrainConfig,
    tokenizer: Tokenizer,
    prefix: str | None,
    sizes: tuple[int, int],
    last_sample: int,
) -> tuple[Samples, Samples]:
    """Build datasets, and add further epochs up to `last_sample` training samples."""
    train, valid = _build(cfg, tokenizer, prefix, sizes)
    if last_sample <= sizes[0]:
        return train, valid
    lengths = read_document_lengths(prefix) if prefix else MockGPTLowLevelDataset(tokenizer).sequence_lengths
    # For mock data Megatron uses other shares than `data.split`.
    (begin, end), *_ = _config(cfg, tokenizer, prefix, cfg.data.cache, sizes).split_matrix
    own = lengths[round(begin * len(lengths)) : round(end * len(lengths))]
    further = []
    for number in range(1, further_epochs(own, cfg.train.seq_length, sizes[0], last_sample) + 1):
        # For one sample, Megatron builds one epoch, which therefore doesn't depend on the run's length.
        epoch, _ = _build(cfg, tokenizer, prefix, (1, 0), seed_of_epoch(cfg.seed, number))
        further.append(epoch)
    return (FurtherEpochs([train, *further]) if train is not None and further else train), valid


def _build(
    cfg: PretrainConfig,
    tokenizer: Tokenizer,
    prefix: str | None,
    sizes: tuple[int, int],
    seed: int | None = None,
) -> tuple[Samples, Samples]:
    cache = cfg.data.cache if prefix is None else str(Path(cfg.data.cache) / _cache_name(prefix))
    config = _config(cfg, tokenizer, prefix, cache, sizes)
    config.random_seed = cfg.seed if seed is None else seed
    kind = MockGPTDataset if prefix is None else GPTDataset
    train, valid, _ = BlendedMegatronDatasetBuilder(kind, [*sizes, 0], _on_every_rank, config).build()
    for part in (train, valid):
        if part is not None:
            # Else masked tokens (-1) of the first sample that a process reads are masked in all its later samples too.
            part.masks_and_position_ids_are_cacheable = False
    return train, valid


def _on_every_rank() -> bool:
    """Answer Megatron, which asks whether a rank needs the datasets."""
    return True


def _config(
    cfg: PretrainConfig, tokenizer: Tokenizer, prefix: str | None, cache: str, sizes: tuple[int, int]
) -> GPTDatasetConfig:
    config = GPTDatasetConfig(
        random_seed=cfg.seed,
        sequence_length=cfg.train.seq_length,
        blend=None if prefix is None else ([prefix], None),  # None: mock
        split=megatron_split(cfg.data.split),
        path_to_cache=cache,
        tokenizer=tokenizer,
        reset_position_ids=cfg.data.attention_within_documents,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    # Megatron would also build the test part and other unused parts, and never finish for a part without documents.
    config.split_matrix = [
        part if size > 0 else None for part, size in zip(config.split_matrix, (*sizes, 0), strict=True)
    ]
    return config


def _cache_name(prefix: str) -> str:
    """Name of the cache folder for this version of the dataset.

    Megatron names a cached index by the dataset's path, not its content: after a text is prepared again, it would use
    an index made from the old documents.
    """
    index = os.stat(f"{prefix}.idx")
    state = hashlib.sha256(f"{os.path.abspath(prefix)} {index.st_size} {index.st_mtime_ns}".encode())
    return f"{Path(prefix).name}-{state.hexdigest()[:12]}"
