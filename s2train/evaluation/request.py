"""Checks what to evaluate before a device is used."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from s2train.checkpoints.trained import Trained
from s2train.data.tokenizers import Tokenizer
from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.evaluation.config import EvaluateConfig
from s2train.evaluation.windows import Window, cut
from s2train.files import check_output
from s2train.planning.checks import check_attention_backend
from s2train.preparation.documents import documents_of
from s2train.preparation.inputs import files_named
from s2train.validation.division import check_whole_models
from s2train.validation.values import check_seed
from s2train.wandb_run import choose_mode

_MODES = ("whole", "sliding")


@dataclass(frozen=True)
class TextToScore:
    """A file's windows.

    Attributes:
        documents: number of documents.
        bytes: of its text in UTF-8; None if the first token of each document is not predicted.
    """

    name: str
    documents: int
    windows: tuple[Window, ...]
    bytes: int | None


@dataclass(frozen=True)
class Request:
    """A checked evaluation.

    Attributes:
        length, stride: tokens of a window, and from one to the next.
        output: file to write.
    """

    trained: Trained
    tokenizer: Tokenizer
    length: int
    stride: int
    texts: tuple[TextToScore, ...]
    output: Path


def read_request(cfg: EvaluateConfig, world_size: int, hardware: Hardware) -> Request:
    """Read and check settings and texts.

    Builds no model and loads no task.

    Args:
        world_size: processes of the job.
        hardware: device of a process.
    Raises:
        ConfigError: a setting can't work, a file is missing, or the output can't be written.
    """
    check_seed(cfg.seed)
    check_attention_backend(cfg.attention_backend, hardware)
    for name, least in (
        ("length", 2),
        ("stride", 1),
        ("batch_size", 1),
        ("prefill_chunk", 1),
        ("limit", 1),
        ("fewshot", 0),
    ):
        value = getattr(cfg, name)
        if value is not None and value < least:
            raise ConfigError(name, value, f"must be {least} or more", f"Set {name}={least} or more")
    if cfg.windows not in _MODES:
        raise ConfigError("windows", cfg.windows, "unknown value", f"Set one of {', '.join(_MODES)}")
    choose_mode(cfg.wandb, "wandb")  # reject a bad mode now
    files = _files(cfg)
    trained = Trained.find(cfg.checkpoint)
    _check_ranks(cfg, world_size)
    trained.check_decoding(cfg.tp)
    tokenizer = trained.tokenizer(cfg.tokenizer)
    length = cfg.length or trained.config.train.seq_length
    trained.check_length(length, "length", length)
    trained.warn_beyond_training(length)
    stride = _stride(cfg, length)
    texts = tuple(_read(path, cfg.text_key, trained, tokenizer, length, stride) for path in files)
    return Request(trained, tokenizer, length, stride, texts, _output(cfg, trained.checkpoint))


def _files(cfg: EvaluateConfig) -> list[Path]:
    given: list[Any] = [] if cfg.text is None else cfg.text if isinstance(cfg.text, list) else [cfg.text]
    if not given and not cfg.tasks:
        raise ConfigError("text", cfg.text, "there is nothing to evaluate", "Set text=FILE, or tasks=[NAME]")
    if not all(isinstance(one, str) and one for one in given):
        raise ConfigError("text", cfg.text, "names no files", "Set text=FILE, or text=[FILE,FILE]")
    files = [path for one in given for path in files_named(one, "text")]
    for path in files:
        if files.count(path) > 1:
            raise ConfigError("text", path, "is there twice", "Name each file once")
    for name in ("task_folder", "fewshot", "limit"):
        if getattr(cfg, name) is not None and not cfg.tasks:
            raise ConfigError(name, getattr(cfg, name), "belongs to tasks, and there are none", "Set tasks=[NAME] too")
    return files


def _check_ranks(cfg: EvaluateConfig, world_size: int) -> None:
    check_whole_models(cfg.tp, world_size)
    if cfg.tasks and cfg.tp != world_size:
        problem = f"tasks are evaluated by one model, and this job has {world_size} processes"
        raise ConfigError("tp", cfg.tp, problem, f"Set tp={world_size}, or start {cfg.tp} processes")


def _stride(cfg: EvaluateConfig, length: int) -> int:
    if cfg.windows == "whole":
        if cfg.stride is not None:
            problem = "windows=whole follow each other without overlap"
            raise ConfigError("stride", cfg.stride, problem, "Set windows=sliding, or leave stride out")
        return length
    stride = cfg.stride or length // 2
    if stride > length:
        problem = f"leaves out tokens between windows of length={length}"
        raise ConfigError("stride", stride, problem, f"Set {length} or less")
    return stride


def _read(path: Path, text_key: str, trained: Trained, tokenizer: Tokenizer, length: int, stride: int) -> TextToScore:
    """Read a file's documents.

    An end token stands before each, as in training, and the first token is predicted from it. Where attention stays
    within documents, nothing stands before a document, and its first token is not predicted.
    """
    documents = documents_of("text", path, path, text_key)
    within = trained.config.data.attention_within_documents
    before = np.array([] if within else [tokenizer.eod], dtype=np.int64)
    sequences = [np.concatenate([before, ids.astype(np.int64)]) for ids in tokenizer.encode_many(documents)]
    windows = tuple(window for ids in sequences for window in cut(ids, length, stride))
    if not windows:
        raise ConfigError("text", path, "holds no text to predict", "Set a file with longer text")
    size = None if within else sum(len(document.encode()) for document in documents)
    return TextToScore(str(path), len(documents), windows, size)


def _output(cfg: EvaluateConfig, checkpoint: Path) -> Path:
    output = checkpoint.parent.parent / "evaluation.json" if cfg.output is None else cfg.output
    return check_output(output, cfg.overwrite, such="runs/evaluation.json")
