"""How the end token that data were prepared with reaches a run on them."""

from dataclasses import replace

from s2train.config import PretrainConfig
from s2train.data.blend import dataset_prefixes
from s2train.data.indexed import read_metadata
from s2train.data.tokenizers import FileTokenizer, Tokenizer, fingerprint, load_tokenizer


def run_tokenizer(cfg: PretrainConfig) -> tuple[PretrainConfig, Tokenizer]:
    """The tokenizer of a run, and its settings with `data.end_token` set where that isn't the usual one.

    Without `data.end_token` documents end as they did when the data were prepared, so that nothing else need name it:
    the settings are kept with the run, and evaluations read them.

    Raises ConfigError for a tokenizer that can't be used, or lacks the end token.
    """
    data = cfg.data
    end = data.end_token or _recorded(cfg)
    tokenizer = load_tokenizer(data.tokenizer, end_token=end)
    if isinstance(tokenizer, FileTokenizer) and data.end_token is None and tokenizer.end_token != tokenizer.usual_end:
        cfg = replace(cfg, data=replace(data, end_token=tokenizer.end_token))
    return cfg, tokenizer


def _recorded(cfg: PretrainConfig) -> str | None:
    """By the first dataset of this tokenizer that tells; `check_data` compares the others."""
    for prefix in dataset_prefixes(cfg.data.path):
        metadata = read_metadata(prefix)
        if metadata is None or metadata.end_token is None:
            continue
        if metadata.fingerprint == fingerprint(cfg.data.tokenizer):
            return metadata.end_token
    return None
