"""Checks what to generate before a device is used."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2train.checkpoints.trained import Trained
from s2train.data.tokenizers import Tokenizer
from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.files import check_output
from s2train.generation.config import GenerateConfig
from s2train.planning.checks import check_attention_backend
from s2train.preparation.documents import documents_of
from s2train.validation.division import check_one_model
from s2train.validation.values import check_seed

FILE = "file:"


@dataclass(frozen=True)
class Request:
    """Checked prompts.

    Attributes:
        prompts: texts to continue.
        ids: tokens of each prompt.
    """

    trained: Trained
    tokenizer: Tokenizer
    prompts: tuple[str, ...]
    ids: tuple[Sequence[int], ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.ids))


def read_request(cfg: GenerateConfig, world_size: int, hardware: Hardware) -> Request:
    """Read and check settings and prompts; builds no model.

    Args:
        world_size: processes of the job.
        hardware: device of a process.
    Raises:
        ConfigError: a setting can't work, a file is missing, or the output can't be written.
    """
    check_seed(cfg.seed)
    check_attention_backend(cfg.attention_backend, hardware)
    for name in ("max_tokens", "batch_size", "prefill_chunk"):
        value = getattr(cfg, name)
        if value is not None and value < 1:
            raise ConfigError(name, value, "must be 1 or more", f"Set {name}=1 or more")
    _check_sampling(cfg)
    if cfg.cuda_graph and hardware.kind != "cuda":
        raise ConfigError("cuda_graph", True, "there is no GPU", "Set cuda_graph=false")
    if cfg.output is not None:
        check_output(cfg.output, cfg.overwrite, such="runs/texts.json")
    trained = Trained.find(cfg.checkpoint)
    check_one_model(cfg.tp, world_size)
    trained.check_decoding(cfg.tp)
    tokenizer = trained.tokenizer(cfg.tokenizer)
    prompts = tuple(_prompts(cfg))
    ids = tuple(tokenizer.encode(prompt) for prompt in prompts)
    for prompt, own in zip(prompts, ids, strict=True):
        if not own:
            raise ConfigError("prompt", repr(prompt), "holds no token", "Begin with some text")
    request = Request(trained, tokenizer, prompts, ids)
    trained.check_length(request.longest + cfg.max_tokens, "max_tokens", cfg.max_tokens, ", or a shorter prompt")
    trained.warn_beyond_training(request.longest + cfg.max_tokens)
    return request


def _check_sampling(cfg: GenerateConfig) -> None:
    if not math.isfinite(cfg.temperature) or cfg.temperature < 0:
        raise ConfigError("temperature", cfg.temperature, "must be 0 or more", "Set 0 for greedy decoding, or 0.8")
    if not 0 < cfg.top_p <= 1:
        raise ConfigError("top_p", cfg.top_p, "is not a probability above 0", "Set more than 0 and up to 1")
    if cfg.top_k is not None and cfg.top_k < 1:
        raise ConfigError("top_k", cfg.top_k, "keeps no token", "Set 1 or more, or null for all")
    given = next((name for name, unset in (("top_k", None), ("top_p", 1.0)) if getattr(cfg, name) != unset), None)
    if cfg.temperature == 0 and given is not None:
        problem = "temperature=0 takes the likeliest token each time, and samples from no others"
        raise ConfigError(given, getattr(cfg, given), problem, f"Set temperature, such as 1, or leave {given} out")


def _prompts(cfg: GenerateConfig) -> list[str]:
    given: list[Any] = cfg.prompt if isinstance(cfg.prompt, list) else [cfg.prompt]
    if not given or not all(isinstance(one, str) for one in given):
        remedy = "Set prompt='A text', prompt=file:PATH, or 'prompt=[\"A text\",\"Another\"]'"
        raise ConfigError("prompt", cfg.prompt, "is not a text, or a list of texts", remedy)
    return [text for one in given for text in (_read(one, cfg.text_key) if one.startswith(FILE) else [one])]


def _read(prompt: str, text_key: str) -> list[str]:
    path = Path(prompt.removeprefix(FILE))
    if not path.is_file():
        raise ConfigError("prompt", prompt, "no such file", "Set file:PATH of a file, or a text")
    texts = documents_of("prompt", prompt, path, text_key, keep_line_end=False)
    if not texts:
        raise ConfigError("prompt", prompt, "holds no text", "Set a file with text")
    return texts
