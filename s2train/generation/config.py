"""Settings of `launch/generate.py`."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from s2train import config


@dataclass
class GenerateConfig:
    """A run of `launch/generate.py`."""

    checkpoint: str = MISSING  # a run folder, its checkpoints folder, or one iter_* in it
    # a text to continue, or file:PATH, or a list of these, as '["A text","file:more.jsonl"]'; a text file is one prompt
    # (without its last line end), JSON lines and .parquet hold one a line or row
    prompt: Any = MISSING
    text_key: str = "text"  # JSON key or .parquet column that holds the prompts
    tokenizer: str | None = None  # new path of the run's tokenizer.json if it was moved; None: the run's own
    max_tokens: int = 128  # tokens to generate for each prompt; fewer if the model ends the document
    temperature: float = 0.0  # 0: the likeliest token each time (greedy); 1: as the model predicts
    top_k: int | None = None  # sample from the top_k likeliest tokens only; None: all
    top_p: float = 1.0  # then only from the fewest likeliest that together have this probability
    seed: int = 1234  # seed of the sampling; a prompt's text does not depend on the other prompts
    batch_size: int | None = None  # prompts decoded together; None: all
    stream: bool = True  # print each token as soon as it is chosen; false: print each text when it is complete
    output: str | None = None  # JSON file to write prompts and texts to; None: print only
    overwrite: bool = False
    cuda_graph: bool = False  # on a GPU, replay decoding from a CUDA graph: faster for more than about ten tokens
    prefill_chunk: int = 8192  # tokens of a prompt that go through the model at once
    attention_backend: str = "auto"  # sparse layers, as in a run
    tp: int = 1  # tensor model parallel: the number of started processes


def register() -> None:
    """Register this schema with Hydra."""
    config.register({"generate": GenerateConfig})
