"""Everything about the data that can be found wrong from its files alone, before a run takes a device."""

from s2train.config import PretrainConfig
from s2train.data.blend import parse_blend
from s2train.data.indexed import read_document_lengths, read_metadata
from s2train.data.splits import split_documents_range
from s2train.data.tokenizers import Tokenizer
from s2train.errors import ConfigError


def num_train_samples(cfg: PretrainConfig) -> int:
    """Samples in the training order: `data.num_samples`, else what `train.steps` take.

    With path, split, seed and sequence length it fixes the order, so a run that is to go on later keeps it.

    Raises ConfigError when the run would need more than `data.num_samples`.
    """
    needed = cfg.train.steps * cfg.train.global_batch_size
    if cfg.data.num_samples is None:
        return needed
    if cfg.data.num_samples < needed:
        problem = f"the run takes {needed:,} samples (train.steps × train.global_batch_size)"
        remedy = f"Set at least {needed:,} when the run starts, or fewer train.steps"
        raise ConfigError("data.num_samples", cfg.data.num_samples, problem, remedy)
    return cfg.data.num_samples


def check_data(cfg: PretrainConfig, tokenizer: Tokenizer) -> None:
    """Refuse data that can't serve the run; reads .idx and .json files only.

    Raises ConfigError for files that are missing, empty or cut off; a tokenizer other than the one the data
    were made with, or larger than the model's vocabulary; a split without enough tokens for one sequence.
    """
    if tokenizer.vocab_size > cfg.model.vocab_size:
        problem = f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size:,} ids"
        remedy = f"Set at least {tokenizer.vocab_size}, a multiple of parallel.tp"
        raise ConfigError("model.vocab_size", cfg.model.vocab_size, problem, remedy)
    num_train_samples(cfg)
    split_documents_range(cfg.data.split, 1)
    for prefix in parse_blend(cfg.data.path).prefixes:
        _check_splits(cfg, prefix)
        metadata = read_metadata(prefix)
        if metadata is not None and metadata.fingerprint != tokenizer.fingerprint:
            problem = f"{prefix} was made with another tokenizer, {metadata.tokenizer}"
            remedy = f"Set {metadata.tokenizer}, or prepare the text again with tokenizer={tokenizer.name}"
            raise ConfigError("data.tokenizer", tokenizer.name, problem, remedy)


def _check_splits(cfg: PretrainConfig, prefix: str) -> None:
    lengths = read_document_lengths(prefix)
    train, held_out, _ = split_documents_range(cfg.data.split, len(lengths))
    wanted = [("train", train)] + ([("held-out", held_out)] if cfg.evaluation.interval else [])
    for name, part in wanted:
        tokens = int(lengths[part.start : part.stop].sum())
        if tokens == 0:
            problem = f"leaves none of the {len(lengths)} documents of {prefix} for the {name} part"
            remedy = "Give that part more, or prepare the text as more documents (a smaller document_chars)"
            raise ConfigError("data.split", cfg.data.split, problem, remedy)
        if tokens <= cfg.train.seq_length:
            problem = f"the {name} part of {prefix} has {tokens:,} tokens; a sample takes one more than its length"
            remedy = f"Set {tokens - 1} or less, or give that part more of data.split"
            raise ConfigError("train.seq_length", cfg.train.seq_length, problem, remedy)
