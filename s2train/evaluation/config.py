"""Settings of `launch/evaluate.py`."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from s2train import config


@dataclass
class EvaluateConfig:
    """A run of `launch/evaluate.py`."""

    checkpoint: str = MISSING  # a run folder, its checkpoints folder, or one iter_* in it
    # a file or [file, …] whose loss to measure, also with *, as '[texts/*.txt]': any input of launch/prepare_data.py;
    # null: only tasks
    text: Any = None
    text_key: str = "text"  # JSON key or .parquet column that holds the documents
    tokenizer: str | None = None  # new path of the run's tokenizer.json if it was moved; None: the run's own
    length: int | None = None  # tokens that the model sees at once; None: as in training
    # how documents are cut to `length`: whole (windows that follow each other; the first token of each has no
    # context), sliding (windows that overlap, so that every token has length - stride or more before it)
    windows: str = "whole"
    stride: int | None = None  # for sliding: tokens from one window to the next; None: half of length
    # tasks of lm-evaluation-harness, such as [lambada_openai,hellaswag]; needs the extra `eval`
    tasks: list[str] = field(default_factory=list)
    task_folder: str | None = None  # folder of your own tasks' YAML files
    fewshot: int | None = None  # examples before each question; None: the task's own number
    limit: int | None = None  # only the first questions of each task
    batch_size: int = 8  # sequences that go through the model at once
    prefill_chunk: int = 8192  # tokens of a sequence that go through the model at once
    output: str | None = None  # JSON file; None: `evaluation.json` in the run folder
    overwrite: bool = False
    wandb: str = "disabled"  # auto, offline, online: log to the training's wandb run
    seed: int = 1234  # of tasks that sample
    attention_backend: str = "auto"  # sparse layers, as in a run
    tp: int = 1  # tensor model parallel; the remaining processes share the text


def register() -> None:
    """Register this schema with Hydra."""
    config.register({"evaluate": EvaluateConfig})
