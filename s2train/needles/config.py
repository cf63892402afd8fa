"""Settings of needle evaluation, and of documents to learn retrieval from."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from s2train import config


@dataclass
class NeedleConfig:
    """A run of `launch/needle.py`."""

    checkpoint: str = MISSING  # a run folder, its checkpoints folder, or one iter_* in it
    tokenizer: str | None = None  # new path of the run's tokenizer.json if it was moved; None: the run's own
    lengths: list[int] | None = None  # tokens, prompt and answer together; None: four lengths up to the trained one
    # what is hidden and asked for: single, multi, key_value, variable_tracking, or [task, …]; see
    # s2train/needles/tasks.py
    task: Any = "single"
    needles: int | None = None  # for multi: number of keys, each with a value; None: 4
    # ask for one or all of multi's keys (None: one), or of variable_tracking's names (None: all)
    ask: str | None = None
    # for key_value: number of other lines; None: fill the length with them, without a haystack
    distractors: int | None = None
    hops: int | None = None  # for variable_tracking: number of names in a chain that refer to another name; None: 4
    chains: int | None = None  # for variable_tracking: number of chains, of which one is asked for; None: 1
    haystack: Any = "noise"  # text around the needles: noise (RULER's repeated sentences), a text file, or [file, …]
    # 0: beginning of the prompt, 1: end
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    # largest random shift of each trial's needle from its depth, as a share of the length; without it, all trials of a
    # round length would meet the same stripe of a layout
    depth_jitter: float = 0.05
    trials: int = 8  # per cell, that is per length and depth
    batch_size: int = 8  # sequences decoded at once on each data parallel rank
    batch_tokens: int | None = None  # limit on the tokens decoded at once; at least one sequence is; None: no limit
    # tokens decoded past the answer's length, for the score of whether the text contains the answer
    extra_tokens: int = 16
    seed: int = 1234  # seed of keys, values and the start in the haystack
    threshold: float = 0.856  # least score at which a length counts as effective; RULER's
    output: str | None = None  # folder for each task's JSON and PNG; None: `needle` in the run folder
    attention_backend: str = "auto"  # sparse layers, as in a run
    tp: int = 1  # tensor model parallel; the remaining processes share the trials
    wandb: str = "disabled"  # auto, offline, online: log heat map, table and score to the training's wandb run


@dataclass
class NeedleDocumentsConfig:
    """Documents to learn needle retrieval from, without what the evaluation asks for.

    For a pair [low, high], each document draws a value log-uniformly from that range.
    """

    # recall, recall_lines: many facts, each of which is asked for later in the document; facts as in the tasks single
    # and key_value. Or a task of the evaluation (`s2train.needles.tasks`): one of its samples per document
    task: str = "recall"
    documents: int = 10_000
    length: int = 512  # tokens of every document, including its end token
    # share of a recall's tokens in sentences; the rest is filler
    share: list[float] = field(default_factory=lambda: [0.05, 1.0])
    # number of a recall's facts; at most half of its sentences
    facts: list[int] = field(default_factory=lambda: [1, 64])
    # share of recalls that state all facts that fit and ask for each once, all at the end, so that look-up distances
    # are spread over the whole document; the other recalls repeat each fact many times, and one look-up in a hundred
    # goes back over half the document
    questions_last: float = 0.0
    haystack: Any = "noise"  # filler text: noise (RULER's repeated sentences), bundled, a text file, or [file, …]
    # processes; the documents don't depend on their number; None: one per core, fewer for few documents
    workers: int | None = None


def register() -> None:
    """Register this schema with Hydra."""
    config.register({"needle": NeedleConfig})
