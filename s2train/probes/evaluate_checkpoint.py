"""Runs the long-range probes on a checkpoint."""

import hashlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2train.checkpoints.inference_model import load_for_inference
from s2train.checkpoints.trained import Trained
from s2train.config import ParallelConfig, PretrainConfig
from s2train.data.tokenizers import Tokenizer
from s2train.distributed.ranks import is_rank_0, world_size
from s2train.environment.hardware import Hardware, detect_own
from s2train.environment.provenance import environment
from s2train.errors import ConfigError, as_typed
from s2train.files import check_output, write_json
from s2train.inference.generation import generate
from s2train.megatron.setup import initialize, shutdown
from s2train.needles.results import weights_fingerprint
from s2train.planning.checks import check_attention_backend
from s2train.probes.completion import NEAREST, Completion, find_completions, score
from s2train.probes.config import ProbesConfig
from s2train.probes.documents import SHORTEST, Document, held_out_documents
from s2train.probes.recurrence import Passage, by_distance, choose_sequences, measure
from s2train.validation.division import check_one_model
from s2train.validation.values import check_seed


@dataclass(frozen=True)
class Request:
    """Checked probes.

    Attributes:
        checkpoint: the iter_* folder.
        completions: by length, shortest first.
        passages: sequences for the loss on second occurrences.
        output: file to write.
    """

    checkpoint: Path
    trained: PretrainConfig
    tokenizer: Tokenizer
    completions: dict[int, list[Completion]]
    passages: list[Passage]
    output: Path


def read_request(cfg: ProbesConfig, world_size: int, hardware: Hardware) -> Request:
    """Check the settings, and choose what to probe; builds no model.

    Raises:
        ConfigError: a setting can't work, a file is missing, or the text holds nothing to probe.
    """
    check_seed(cfg.seed)
    check_attention_backend(cfg.attention_backend, hardware)
    for name in ("trials", "batch_size", "sequences"):
        if getattr(cfg, name) < 1:
            raise ConfigError(name, getattr(cfg, name), "must be 1 or more", f"Set {name}=8")
    if not cfg.lengths or min(cfg.lengths) < 64 or len(set(cfg.lengths)) < len(cfg.lengths):
        problem = "must hold different lengths of 64 tokens or more"
        raise ConfigError("lengths", list(cfg.lengths), problem, "Set lengths=[1024,4096,16384]")
    found = Trained.find(cfg.checkpoint)
    checkpoint, trained = found.checkpoint, found.config
    check_one_model(cfg.tp, world_size)
    found.check_decoding(cfg.tp)
    found.check_length(max(cfg.lengths), "lengths", list(cfg.lengths))
    found.warn_beyond_training(max(cfg.lengths))
    output = checkpoint.parent.parent / "probes.json" if cfg.output is None else cfg.output
    output = check_output(output, cfg.overwrite, such="runs/probes.json")
    tokenizer = found.tokenizer(cfg.tokenizer)
    documents = held_out_documents(cfg, tokenizer)
    completions = {length: find_completions(documents, length, cfg.trials, cfg.seed) for length in sorted(cfg.lengths)}
    _check_found(cfg, documents, completions)
    passages = choose_sequences(documents, max(cfg.lengths), cfg.sequences, cfg.seed)
    if not passages:
        problem = "no part of the text that long holds a rare identifier twice"
        raise ConfigError("lengths", max(cfg.lengths), problem, "Set shorter lengths, or a text with longer documents")
    return Request(checkpoint, trained, tokenizer, completions, passages, output)


def _check_found(
    cfg: ProbesConfig, documents: Sequence[Document], completions: Mapping[int, Sequence[Completion]]
) -> None:
    """Check that the text holds an identifier to complete at every length."""
    lacking = [length for length, chosen in completions.items() if not chosen]
    if not lacking:
        return
    if not any(document.occurrences for document in documents):
        problem = f"holds no identifier of {SHORTEST} characters or more"
        raise ConfigError("text", cfg.text, problem, "Set a text of source code")
    named = " and ".join(f"{length:,}" for length in lacking)
    problem = f"the text holds no identifier that is defined once and used {named} tokens behind, less up to 30 %"
    longest = max(len(document.ids) for document in documents)
    other = f"a text with more or longer documents than these, of up to {longest:,} tokens"
    usable = [length for length in cfg.lengths if length not in lacking]
    remedy = f"Set lengths={as_typed(usable)}, or {other}" if usable else f"Set other lengths, or {other}"
    raise ConfigError("lengths", list(cfg.lengths), problem, remedy)


def evaluate(cfg: ProbesConfig) -> dict[str, Any]:
    """Probe a checkpoint, and write the results; collective.

    Raises:
        ConfigError: a setting can't work; before a process group exists, unless the checkpoint is damaged.
    """
    request = read_request(cfg, world_size(), detect_own())
    device = initialize(ParallelConfig(tp=cfg.tp), cfg.seed)
    loaded = load_for_inference(request.checkpoint, device, cfg.tp, cfg.attention_backend)

    def logits(tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=device)[None]
        predicted: Tensor = loaded.model(tokens, positions, None)
        return predicted

    completed = []
    for length, completions in request.completions.items():
        decode = partial(generate, loaded.model)
        with_definition, without = score(decode, completions, cfg.batch_size, device)
        row = {
            "length": length,
            "distances": [min(one.distance for one in completions), max(one.distance for one in completions)],
            "with_definition": with_definition.as_json(),
            "without_definition": without.as_json(),
        }
        completed.append(row)
    content = {
        "checkpoint": str(loaded.path),
        "step": loaded.step,
        "weights": weights_fingerprint(loaded.path),
        "text": {"file": cfg.text, "sha256": hashlib.sha256(Path(cfg.text).read_bytes()).hexdigest()[:16]},
        "tokenizer": request.tokenizer.fingerprint,
        "seed": cfg.seed,
        "trained_length": request.trained.train.seq_length,
        "nearest": NEAREST,
        "completion": completed,
        "recurrence": {
            "sequences": len(request.passages),
            "length": max(cfg.lengths),
            "by_distance": by_distance(measure(logits, request.passages, device)),
        },
        "command": shlex.join(sys.argv),
        "environment": environment(),
    }
    if is_rank_0():
        write_json(request.output, content)
        print(summary(content), f"results in {request.output}", sep="\n", flush=True)
    shutdown()
    return content


def summary(content: dict[str, Any]) -> str:
    """Format the results in a line per length and range of distance."""
    lines = [
        f"{row['length']:>7,} tokens, defined {low:,} to {high:,} back: completed {_share(row['with_definition'])},"
        f" without the definition {_share(row['without_definition'])}"
        for row in content["completion"]
        for low, high in [row["distances"]]
    ]
    lines += [
        f"{row['from']:>7,} to {row['to']:,} tokens back: {row['count']:,} identifiers, loss"
        f" {row['second_loss']:.4f}, at their first occurrence {row['first_loss']:.4f}"
        for row in content["recurrence"]["by_distance"]
    ]
    return "\n".join(lines)


def _share(score: dict[str, Any]) -> str:
    return f"{score['correct']}/{score['trials']}"
