"""Evaluates a checkpoint on texts and tasks, and writes the results."""

import json
import shlex
import sys
from typing import Any

import torch
from megatron.core import parallel_state

from s2train.checkpoints.inference_model import load_for_inference
from s2train.config import ParallelConfig
from s2train.distributed.ranks import is_rank_0, world_size
from s2train.environment.hardware import detect_own
from s2train.environment.provenance import environment
from s2train.errors import ConfigError
from s2train.evaluation.config import EvaluateConfig
from s2train.evaluation.report import log_figures, report
from s2train.evaluation.request import Request, TextToScore, read_request
from s2train.evaluation.scoring import Scorer
from s2train.evaluation.tasks import load_tasks, run_tasks
from s2train.evaluation.text_loss import measure
from s2train.files import replacing, without_nan
from s2train.inference.page_pool import OutOfPagesError
from s2train.megatron.model import unwrap
from s2train.megatron.setup import initialize, shutdown
from s2train.needles.results import weights_fingerprint
from s2train.wandb_run import choose_mode


def evaluate(cfg: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a checkpoint, and write the results; collective.

    Raises:
        ConfigError: a setting can't work; before a process group exists, unless the checkpoint is damaged.
    """
    request = read_request(cfg, world_size(), detect_own())
    tasks = load_tasks(cfg, request.length)
    is_first = is_rank_0()
    mode = choose_mode(cfg.wandb, "wandb") if is_first else "disabled"
    device = initialize(ParallelConfig(tp=cfg.tp), cfg.seed)
    loaded = load_for_inference(request.trained.checkpoint, device, cfg.tp, cfg.attention_backend)
    scorer = Scorer(unwrap(loaded.model), device, cfg.prefill_chunk)
    try:
        texts = [_measure(cfg, request, text, scorer) for text in request.texts]
        found = {} if tasks is None else run_tasks(cfg, tasks, scorer, request.tokenizer, request.length)
    except (torch.OutOfMemoryError, OutOfPagesError) as error:
        problem = f"out of memory with {request.length:,} tokens"
        remedy = "Set a smaller batch_size, prefill_chunk or length, or a larger tp"
        raise ConfigError("batch_size", cfg.batch_size, problem, remedy) from error
    content = {
        "checkpoint": str(loaded.path),
        "step": loaded.step,
        "weights": weights_fingerprint(loaded.path),
        "tokenizer": request.tokenizer.fingerprint,
        "length": request.length,
        "windows": cfg.windows,
        "stride": request.stride,
        "trained_length": request.trained.config.train.seq_length,
        "texts": texts,
        "tasks": found,
        "command": shlex.join(sys.argv),
        "environment": environment(),
    }
    if is_first:
        with replacing(request.output) as temporary:
            temporary.write_text(json.dumps(without_nan(content), indent=1, default=str) + "\n")
        print(report(content), f"results in {request.output}", sep="\n", flush=True)
    if mode != "disabled":
        print(f"wandb run {log_figures(content, loaded.path, request.trained.config, mode)}", flush=True)
    shutdown()
    return content


def _measure(cfg: EvaluateConfig, request: Request, text: TextToScore, scorer: Scorer) -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group()
    found = measure(text.windows, request.length, cfg.batch_size, scorer, scorer.device, text.bytes, group)
    return {"file": text.name, "documents": text.documents, **found.as_json()}
