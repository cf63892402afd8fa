"""Generates text from a checkpoint, and prints and writes it."""

import io
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from s2train.checkpoints.inference_model import Loaded, load_for_inference
from s2train.config import ParallelConfig
from s2train.distributed.ranks import is_rank_0, world_size
from s2train.environment.hardware import detect_own
from s2train.environment.provenance import environment
from s2train.errors import ConfigError
from s2train.files import replacing
from s2train.generation.config import GenerateConfig
from s2train.generation.request import Request, read_request
from s2train.generation.text import Terminal, TextStream
from s2train.inference.generation import pad_prompts, stream
from s2train.inference.page_pool import OutOfPagesError
from s2train.inference.sampling import Choose, Sampler, among, greedy
from s2train.megatron.core_attention import cores_of
from s2train.megatron.setup import initialize, shutdown

_TITLE_CHARACTERS = 60
_CPU_IS_FULL = "can't allocate memory"  # torch raises a plain RuntimeError for this


@dataclass(frozen=True)
class Text:
    """A prompt's continuation.

    Attributes:
        ended: whether the model ended the document.
    """

    prompt: str
    text: str
    tokens: list[int]
    ended: bool


def run(cfg: GenerateConfig) -> list[Text]:
    """Generate, and print on rank 0; collective.

    Raises:
        ConfigError: a setting can't work; before a process group exists, unless the checkpoint is damaged.
    """
    request = read_request(cfg, world_size(), detect_own())
    is_first = is_rank_0()
    device = initialize(ParallelConfig(tp=cfg.tp), cfg.seed)
    loaded = load_for_inference(request.trained.checkpoint, device, cfg.tp, cfg.attention_backend)
    _check_graph(cfg, loaded)
    began = time.monotonic()
    texts = generate_texts(cfg, request, loaded, device, sys.stdout if is_first else io.StringIO())
    seconds = time.monotonic() - began
    if is_first:
        count = sum(len(one.tokens) for one in texts)
        print(f"{count:,} tokens in {seconds:.1f} s ({count / seconds:.1f} tokens/s)", file=sys.stderr, flush=True)
        if cfg.output is not None:
            _write(cfg, loaded, texts)
    shutdown()
    return texts


def generate_texts(
    cfg: GenerateConfig, request: Request, loaded: Loaded, device: torch.device, out: TextIO
) -> list[Text]:
    """Continue the prompts, batch by batch; prints to `out`.

    Raises:
        ConfigError: memory runs out.
    """
    count, texts = len(request.prompts), list[Text]()
    size = cfg.batch_size or count
    try:
        for first in range(0, count, size):
            texts += _batch(cfg, request, loaded, range(first, min(first + size, count)), device, out)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError | OutOfPagesError) and _CPU_IS_FULL not in str(error):
            raise
        longest = request.longest + cfg.max_tokens
        problem, remedy = f"out of memory with {size} texts of up to {longest:,} tokens together", "or a larger tp"
        if size == 1:
            raise ConfigError("max_tokens", cfg.max_tokens, problem, f"Set fewer tokens, {remedy}") from error
        remedy = f"Set a smaller batch_size or max_tokens, {remedy}"
        raise ConfigError("batch_size", cfg.batch_size, problem, remedy) from error
    return texts


def _batch(
    cfg: GenerateConfig, request: Request, loaded: Loaded, numbers: range, device: torch.device, out: TextIO
) -> list[Text]:
    tokenizer, total = request.tokenizer, len(request.prompts)
    ids = [request.ids[number] for number in numbers]
    titles = [_title(number, total, request.prompts[number]) if total > 1 else "" for number in numbers]
    terminal = Terminal(out, titles, waits=not cfg.stream)
    streams = [TextStream(tokenizer, own) for own in ids]
    tokens: list[list[int]] = [[] for _ in ids]
    parts: list[list[str]] = [[] for _ in ids]
    ended = [False] * len(ids)

    def show(number: int, text: str) -> None:
        parts[number].append(text)
        terminal.add(number, text)

    prompts, lengths = pad_prompts(ids)
    steps = stream(
        loaded.model,
        prompts.to(device),
        cfg.max_tokens,
        lengths=lengths,
        eod=tokenizer.eod,
        choose=_chooser(cfg, numbers, tokenizer.vocab_size),
        prefill_chunk=cfg.prefill_chunk,
        cuda_graph=cfg.cuda_graph,
    )
    for chosen in steps:
        for number, token in enumerate(chosen.tolist()):
            if ended[number]:
                continue
            if token == tokenizer.eod:
                ended[number] = True
                show(number, streams[number].end())
                terminal.finish(number)
            else:
                tokens[number].append(token)
                show(number, streams[number].add(token))
    for number, has_ended in enumerate(ended):
        if not has_ended:
            show(number, streams[number].end())
            terminal.finish(number)
    given = [request.prompts[number] for number in numbers]
    return [Text(*one) for one in zip(given, map("".join, parts), tokens, ended, strict=True)]


def _chooser(cfg: GenerateConfig, numbers: range, vocab_size: int) -> Choose:
    """Make what chooses tokens."""
    inner: Choose = greedy
    if cfg.temperature > 0:
        inner = Sampler(cfg.seed, numbers, cfg.temperature, cfg.top_k, cfg.top_p)
    return among(inner, vocab_size)


def _check_graph(cfg: GenerateConfig, loaded: Loaded) -> None:
    if cfg.cuda_graph and not all(core.captures_decoding for core in cores_of(loaded.model)):
        problem = "a layer's kind of attention decodes with the host's help"
        raise ConfigError("cuda_graph", True, problem, "Set cuda_graph=false")


def _title(number: int, total: int, prompt: str) -> str:
    line = " ".join(prompt.split())
    shown = line if len(line) <= _TITLE_CHARACTERS else f"{line[:_TITLE_CHARACTERS]}…"
    return f"--- {number + 1} of {total}: {shown}"


def _write(cfg: GenerateConfig, loaded: Loaded, texts: Sequence[Text]) -> None:
    assert cfg.output is not None
    content = {
        "checkpoint": str(loaded.path),
        "step": loaded.step,
        "settings": {name: getattr(cfg, name) for name in ("max_tokens", "temperature", "top_k", "top_p", "seed")},
        "texts": [vars(one) for one in texts],
        "command": shlex.join(sys.argv),
        "environment": environment(),
    }
    with replacing(Path(cfg.output)) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"texts in {cfg.output}", file=sys.stderr, flush=True)
