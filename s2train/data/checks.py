"""Checks a run's data from files, before using a device."""

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset

from s2train.batch_sizes import samples_of
from s2train.command_line.commands import shell_setting
from s2train.config import PretrainConfig
from s2train.data.blend import dataset_prefixes, parse_blend
from s2train.data.contents import contents_of
from s2train.data.epochs import training_epochs
from s2train.data.indexed import Metadata, read_document_lengths, read_ends, read_metadata
from s2train.data.parts import check_parts
from s2train.data.splits import more_documents, split_documents_range
from s2train.data.tokenizers import Tokenizer
from s2train.errors import ConfigError
from s2train.files import check_writable
from s2train.validation.division import vocabulary_for
from s2train.validation.token_budgets import length

_MOST_EPOCHS = 100_000  # in one order of samples
_MASKED = -1  # Megatron's id of a token that doesn't count in the loss


def samples_of_steps(cfg: PretrainConfig, first_step: int = 0, consumed: int = 0) -> int:
    """Number of samples that `train.steps` take from `first_step` on, after `consumed` samples."""
    return samples_of(cfg.train, cfg.train.steps - first_step, consumed)


def num_train_samples(cfg: PretrainConfig, first_step: int = 0) -> int:
    """Number of samples for which a new run's training order is built.

    It is `data.num_samples`, or else the number that the run's steps take. Together with path, split, seed and sequence
    length it determines the order, so a resumed run keeps it. If the run needs more samples, further epochs follow.

    Args:
        first_step: step at which these data begin; above 0 in a new phase (`checkpoint.new_data`).
    """
    return cfg.data.num_samples or samples_of_steps(cfg, first_step)


def check_data(cfg: PretrainConfig, tokenizer: Tokenizer) -> None:
    """Reject data that the run can't use.

    Reads .idx and .json files, and some tokens of data without a .json and of held-out data as large as training data.

    Raises:
        ConfigError: a file is missing, empty or truncated; the tokenizer or the end token is not the one that made the
            data; the tokenizer is larger than the model's vocabulary; the order of samples is far too long; two
            datasets hold the same documents, of training or held-out data and training; no .json names the tokenizer,
            and the first or the last million tokens hold an id outside the vocabulary; a part of the split is too
            short for one sequence; or the cache can't be written.
    """
    if tokenizer.vocab_size > cfg.model.vocab_size:
        problem = f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size:,} ids"
        remedy = vocabulary_for(tokenizer.vocab_size, cfg.parallel.tp)
        raise ConfigError("model.vocab_size", cfg.model.vocab_size, problem, remedy)
    check_parts(cfg)
    prefixes = _check_lengths(cfg, tokenizer)
    _check_copies(cfg)
    _check_epochs(cfg)
    for prefix in prefixes:
        metadata = read_metadata(prefix)
        if metadata is not None:
            _check_metadata(cfg, prefix, metadata, prefixes, tokenizer)
            continue
        _check_ids(cfg, prefix)
        if cfg.data.attention_within_documents:
            _check_ends(prefix, tokenizer)
    check_writable("data.cache", cfg.data.cache)


def _check_lengths(cfg: PretrainConfig, tokenizer: Tokenizer) -> list[str]:
    """Check that each part is long enough; return all datasets."""
    blend = parse_blend(cfg.data.path)
    prefixes = list(blend.prefixes)
    if blend.is_mock:
        _check_splits(cfg, "mock data", MockGPTLowLevelDataset(tokenizer).sequence_lengths)
        return prefixes
    if cfg.data.valid_path is None:
        for prefix in prefixes:
            _check_splits(cfg, prefix, read_document_lengths(prefix))
        return prefixes
    for prefix in prefixes:
        _check_length(cfg, prefix, "train", read_document_lengths(prefix))
    held_out = dataset_prefixes(cfg.data.valid_path)
    for prefix in held_out:
        try:
            _check_length(cfg, prefix, "held-out", read_document_lengths(prefix))
        except ConfigError as error:
            if error.setting != "data.path":
                raise
            raise ConfigError("data.valid_path", prefix, error.problem, error.remedy) from error
    return [*prefixes, *held_out]


def _check_copies(cfg: PretrainConfig) -> None:
    """Reject two training datasets of the same contents, and held-out copies.

    Training data are often copied to a faster disk.
    """
    trained_on = dataset_prefixes(cfg.data.path)
    held_out = dataset_prefixes(cfg.data.valid_path) if cfg.data.valid_path is not None else ()
    for number, prefix in enumerate(trained_on):
        if copied := _copied_by(prefix, trained_on[:number]):
            problem = f"{prefix} holds the same documents as {copied}"
            raise ConfigError("data.path", cfg.data.path, problem, "Name one of them, with the sum of their weights")
    for prefix in held_out:
        if copied := _copied_by(prefix, trained_on):
            problem = f"{prefix} holds the same documents as {copied}, which the run trains on"
            remedy = "Set data.valid_path to other data, or null to hold out by data.split"
            raise ConfigError("data.valid_path", cfg.data.valid_path, problem, remedy)


def _copied_by(prefix: str, others: Sequence[str]) -> str | None:
    """Return the first of other datasets with the same contents, if any."""
    size = os.path.getsize(f"{prefix}.bin")  # most differ in it, which saves reading them
    alike = [other for other in others if os.path.getsize(f"{other}.bin") == size]
    return next((other for other in alike if contents_of(other) == contents_of(prefix)), None)


def _check_metadata(
    cfg: PretrainConfig, prefix: str, metadata: Metadata, prefixes: list[str], tokenizer: Tokenizer
) -> None:
    """Check that the run has the tokenizer that made a dataset."""
    if metadata.fingerprint != tokenizer.fingerprint:
        problem = f"{prefix} was made with another tokenizer, {metadata.tokenizer}"
        remedy = (
            f"Set {shell_setting('data.tokenizer', metadata.tokenizer)}, or prepare the text again:"
            f" python launch/prepare_data.py input=… output=… {shell_setting('tokenizer', tokenizer.name)}"
        )
        raise ConfigError("data.tokenizer", tokenizer.name, problem, remedy)
    if metadata.end_token in (None, tokenizer.end_token):
        return
    problem = f"{prefix} was prepared with the end token {metadata.end_token}"
    made = ((other, read_metadata(other)) for other in prefixes)
    if agreeing := [other for other, data in made if data and data.end_token == tokenizer.end_token]:
        problem = f"{problem}, but {agreeing[0]} with {tokenizer.end_token}"
        raise ConfigError("data.path", cfg.data.path, problem, "Prepare one of them again, with end_token")
    remedy = f"Set 'data.end_token=\"{metadata.end_token}\"', in both quotes, or prepare the text again"
    raise ConfigError("data.end_token", tokenizer.end_token, problem, remedy)


def _check_epochs(cfg: PretrainConfig) -> None:
    """Reject an order of samples that takes Megatron hours, or all memory."""
    for one in training_epochs(cfg.data, num_train_samples(cfg), cfg.train.seq_length):
        if one.epochs <= _MOST_EPOCHS:
            continue
        problem = f"one order of samples would hold {one.epochs:,.0f} epochs of {one.prefix}, at most {_MOST_EPOCHS:,}"
        if cfg.data.num_samples is not None:
            raise ConfigError("data.num_samples", cfg.data.num_samples, problem, "Set fewer, or null.")
        steps, samples = length(cfg, "train.steps"), int(num_train_samples(cfg) / one.epochs)
        remedy = f"Set fewer, more data, or data.num_samples, such as {max(1000 * samples, 1)}: further epochs follow."
        raise ConfigError(steps.setting, steps.value, problem, remedy)


def _check_ids(cfg: PretrainConfig, prefix: str) -> None:
    for tokens in read_ends(prefix):
        low, high = int(tokens.min()), int(tokens.max())
        if low < _MASKED or high >= cfg.model.vocab_size:
            wrong = low if low < _MASKED else high
            remedy = (
                "Set the vocabulary of the tokenizer that made the data, or prepare them with launch/prepare_data.py"
            )
            raise ConfigError("model.vocab_size", cfg.model.vocab_size, f"{prefix}.bin holds the id {wrong:,}", remedy)


def _check_ends(prefix: str, tokenizer: Tokenizer) -> None:
    """Check that other tools' documents end with the tokenizer's end token.

    Attention within documents separates them by that token.
    """
    tokens, _ = read_ends(prefix)
    last = np.cumsum(read_document_lengths(prefix), dtype=np.int64) - 1
    last = last[last < len(tokens)]
    if len(last) and not (tokens[last] == tokenizer.eod).any():
        problem = f"none of the first {len(last):,} documents of {prefix} ends with {tokenizer.end_token or 'the'} id"
        remedy = "Set data.end_token to the token that ends them, or prepare them with launch/prepare_data.py"
        raise ConfigError("data.attention_within_documents", True, f"{problem} {tokenizer.eod}", remedy)


def _check_splits(cfg: PretrainConfig, data: str, lengths: npt.NDArray[np.int32]) -> None:
    train, held_out, _ = split_documents_range(cfg.data.split, len(lengths))
    wanted = [("train", train)] + ([("held-out", held_out)] if cfg.evaluation.interval else [])
    for name, part in wanted:
        tokens = int(lengths[part.start : part.stop].sum(dtype=np.int64))
        if tokens == 0:
            count = f"{len(lengths)} document{'' if len(lengths) == 1 else 's'}"
            problem = f"leaves the {name} part of {data} without any of its {count}"
            raise ConfigError("data.split", cfg.data.split, problem, more_documents(len(lengths)))
        _check_length(cfg, data, name, lengths[part.start : part.stop])


def _check_length(cfg: PretrainConfig, data: str, name: str, lengths: npt.NDArray[np.int32]) -> None:
    tokens = int(lengths.sum(dtype=np.int64))
    if tokens <= cfg.train.seq_length:
        problem = f"the {name} part of {data} has {tokens:,} tokens; a sample needs one more than its length"
        remedy = f"Set {tokens - 1} or less, or give that part a larger share in data.split"
        if cfg.data.valid_path is not None:
            remedy = f"Set {tokens - 1} or less, or a larger dataset"
        elif name == "held-out":
            remedy += ", or evaluation.interval=0 for no held-out loss"
        raise ConfigError("train.seq_length", cfg.train.seq_length, problem, remedy)
