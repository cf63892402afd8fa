"""What an evaluation is asked for, checked: everything that files and settings can tell, before a device is taken."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2train.config import NeedleConfig, PretrainConfig
from s2train.data.needles import NOISE, NeedleSampler, text_haystack
from s2train.data.tokenizers import load_tokenizer
from s2train.errors import ConfigError
from s2train.evaluation.needle import NeedleGrid, check_fit, choose_grid
from s2train.evaluation.results import output_folder
from s2train.files import check_writable
from s2train.hardware import Hardware
from s2train.megatron.checkpoint import find_checkpoint, read_config
from s2train.planning.checks import check_attention_backend
from s2train.planning.division import check_tensor_parallel
from s2train.planning.settings import check_choice, check_seed


@dataclass(frozen=True)
class Request:
    """A needle evaluation that can start.

    Attributes:
        checkpoint: the iter_* folder.
        trained: settings of the run that wrote it.
        folder: where results go.
    """

    checkpoint: Path
    trained: PretrainConfig
    sampler: NeedleSampler
    grid: NeedleGrid
    folder: Path


def read_request(cfg: NeedleConfig, world_size: int, hardware: Hardware) -> Request:
    """Read and check what `cfg` names, for `world_size` processes on devices like `hardware`; writes nothing.

    Raises:
        ConfigError: a setting that can't work, a file that is missing, an output that can't be written.
    """
    check_seed(cfg.seed)
    check_choice("attention_backend", cfg.attention_backend)
    check_attention_backend(cfg.attention_backend, hardware)
    if cfg.batch_size < 1:
        raise ConfigError("batch_size", cfg.batch_size, "no sequence in a batch", "Use 1 or more")
    haystack = _haystack(cfg.haystack)
    checkpoint = find_checkpoint(cfg.checkpoint)
    trained = read_config(checkpoint)
    if cfg.tp < 1 or world_size % cfg.tp:
        remedy = f"Use a divisor of {world_size}, or start more processes with torchrun --nproc-per-node"
        raise ConfigError("tp", cfg.tp, f"does not divide the {world_size} processes of this job", remedy)
    check_tensor_parallel(trained.model, cfg.tp, "tp")
    tokenizer = load_tokenizer(cfg.tokenizer or trained.data.tokenizer, "tokenizer")
    if tokenizer.vocab_size > (rows := trained.model.vocab_size):
        problem = f"it has {tokenizer.vocab_size:,} ids, and the model {rows:,}"
        raise ConfigError("tokenizer", tokenizer.name, problem, "Name the one that the run was trained with")
    sampler = NeedleSampler(tokenizer, haystack)
    grid = choose_grid(cfg, trained.train.seq_length, sampler)
    check_fit(sampler, grid)
    folder = output_folder(cfg)
    check_writable("output", folder)
    return Request(checkpoint, trained, sampler, grid, folder)


def _haystack(given: Any) -> str:
    if given == "noise":
        return NOISE
    files = [given] if isinstance(given, str) else given
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise ConfigError("haystack", given, "names no text", "Set noise, a text file, or [file, …]")
    return text_haystack([Path(file) for file in files])
