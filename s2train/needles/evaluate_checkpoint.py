"""Evaluates needle retrieval of a checkpoint."""

import shlex
import sys
from functools import partial

import torch
from megatron.core import parallel_state

from s2train.checkpoints.inference_model import load_for_inference
from s2train.config import ParallelConfig
from s2train.distributed.ranks import is_rank_0, world_size
from s2train.environment.hardware import detect_own
from s2train.environment.provenance import environment
from s2train.errors import ConfigError
from s2train.files import FolderLock, lock_folder
from s2train.inference.generation import generate
from s2train.inference.page_pool import OutOfPagesError
from s2train.megatron.setup import initialize, shutdown
from s2train.needles.config import NeedleConfig
from s2train.needles.evaluation import run_needles
from s2train.needles.reach import NeedleReach
from s2train.needles.request import Request, read_request
from s2train.needles.results import TITLES, NeedleResults, file_name, layout_fingerprint, weights_fingerprint
from s2train.needles.retrieval import Ranks
from s2train.needles.tracking import log_needles
from s2train.planning import hybrid_layout
from s2train.wandb_run import choose_mode


def evaluate(cfg: NeedleConfig) -> None:
    """Load a checkpoint and evaluate it; collective.

    Raises:
        ConfigError: a setting can't work; before a process group exists, unless the checkpoint is damaged.
    """
    hardware = detect_own()
    request = read_request(cfg, world_size(), hardware)
    is_first = is_rank_0()
    mode = choose_mode(cfg.wandb, "wandb") if is_first else "disabled"
    locks = _claim(request) if is_first else []
    device = initialize(ParallelConfig(tp=cfg.tp), cfg.seed)
    loaded = load_for_inference(request.checkpoint, device, cfg.tp, cfg.attention_backend)
    settings = {
        "weights": weights_fingerprint(loaded.path),
        "layout": layout_fingerprint(request.trained),
        "haystack": cfg.haystack,
        "haystack_text": request.haystack_fingerprint,
        "depth_jitter": cfg.depth_jitter,
        "trials": cfg.trials,
        "extra_tokens": cfg.extra_tokens,
        "seed": cfg.seed,
        "attention_backend": cfg.attention_backend,
    }
    ranks = Ranks(
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_data_parallel_group(),
    )
    hybrid = hybrid_layout(request.trained)
    command, machine = shlex.join(sys.argv), environment()
    found = {}
    for problem in request.problems:
        sampler, grid = problem.sampler, problem.grid
        own = {"task": problem.name, **problem.settings, "tokenizer": sampler.tokenizer.fingerprint, **settings}
        asked = NeedleResults(
            str(loaded.path), loaded.step, own, list(grid.lengths), list(grid.depths), threshold=cfg.threshold,
            command=command, environment=machine,
        )  # fmt: skip
        try:
            found[problem.name] = run_needles(
                partial(generate, loaded.model),
                sampler,
                grid,
                asked,
                request.folder,
                batch_size=cfg.batch_size,
                batch_tokens=cfg.batch_tokens,
                extra_tokens=cfg.extra_tokens,
                device=device,
                trained_length=request.trained.train.seq_length,
                ranks=ranks,
                reach=NeedleReach(hybrid, sampler, grid) if hybrid.is_static else None,
                name=file_name(problem.name),
                title=f"{TITLES[problem.name]}: {request.trained.model.name}",
            )
        except (torch.OutOfMemoryError, OutOfPagesError) as error:
            reason = f"out of memory with lengths up to {max(grid.lengths)}"
            remedy = "Use a smaller batch_size or a larger tp; finished cells are kept"
            raise ConfigError("batch_size", cfg.batch_size, reason, remedy) from error
    if mode != "disabled":
        print(f"wandb run {log_needles(found, request.trained, request.folder, mode)}", flush=True)
    shutdown()
    for lock in locks:
        lock.release()


def _claim(request: Request) -> list[FolderLock]:
    """Lock the tables against other evaluations.

    Each is written whole after every cell.

    Raises:
        ConfigError: another process writes one, or a lock can't be written.
    """
    names = (file_name(problem.name) for problem in request.problems)
    return [
        lock_folder("output", request.folder, f".{name}.lock", f"another evaluation writes {name}.json there")
        for name in names
    ]
