"""Finds the end token of a run's data."""

from dataclasses import replace

from s2train.config import PretrainConfig
from s2train.data.blend import dataset_prefixes
from s2train.data.indexed import read_metadata
from s2train.data.tokenizers import FileTokenizer, Tokenizer, fingerprint, load_tokenizer


def run_tokenizer(cfg: PretrainConfig) -> tuple[PretrainConfig, Tokenizer]:
    """Load the tokenizer of a run, and complete its settings.

    Without `data.end_token`, documents end with the token that they were prepared with. If that is not the default one,
    the returned settings name it: they are saved with the run, and evaluations read them.

    Raises:
        ConfigError: the tokenizer can't be used or lacks the end token.
    """
    data = cfg.data
    end = data.end_token or _recorded(cfg)
    tokenizer = load_tokenizer(data.tokenizer, end_token=end)
    if isinstance(tokenizer, FileTokenizer) and data.end_token is None and tokenizer.end_token != tokenizer.default_end:
        cfg = replace(cfg, data=replace(data, end_token=tokenizer.end_token))
    return cfg, tokenizer


def _recorded(cfg: PretrainConfig) -> str | None:
    """End token recorded by the first dataset of this tokenizer.

    `check_data` compares the others.
    """
    for prefix in dataset_prefixes(cfg.data.path):
        metadata = read_metadata(prefix)
        if metadata is None or metadata.end_token is None:
            continue
        if metadata.fingerprint == fingerprint(cfg.data.tokenizer):
            return metadata.end_token
    return None
