"""Profiles a checkpoint on calibration text.

It runs forward and backward, and saves the sums so far to resume from.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from s2train.config import ParallelConfig
from s2train.environment.hardware import Hardware, detect_own
from s2train.environment.provenance import environment
from s2train.errors import ConfigError
from s2train.files import check_output
from s2train.kernels.layout import BLOCK_SIZES
from s2train.megatron.setup import initialize, shutdown
from s2train.needles.results import weights_fingerprint
from s2train.semsa.accumulation import Accumulator
from s2train.semsa.calibration import Labels, Subject, label_seed, load_studied, read_subject, samples, token_losses
from s2train.semsa.config import ProfileAttentionConfig
from s2train.semsa.core_attention import studied_layers
from s2train.semsa.profile import Profile, about_profile, check_same_model, load_profile, ranked_columns
from s2train.semsa.rules import Rule, make_library

_UNFINISHED = ".unfinished.npz"
# Of `Profile.about`, what another start of the same command may have otherwise.
_MAY_DIFFER = ("done", "tokens", "command", "environment", "data_parallel_ranks")


@dataclass(frozen=True)
class Request:
    """Checked settings."""

    subject: Subject
    labels: Labels
    block_size: int
    rules: tuple[Rule, ...]
    columns: np.ndarray | None
    output: Path
    unfinished: Path


def read_request(cfg: ProfileAttentionConfig, world_size: int, hardware: Hardware) -> Request:
    """Check the settings; builds no model.

    Raises:
        ConfigError: a setting can't work, a file is missing, or the checkpoint isn't dense.
    """
    for name, least in (("samples", 1), ("save_interval", 1), ("verify", 0), ("verify_samples", 1)):
        if getattr(cfg, name) < least:
            raise ConfigError(name, getattr(cfg, name), "too small", f"Set {name}={least} or more.")
    if cfg.labels not in ("sampled", "data"):
        raise ConfigError("labels", cfg.labels, "unknown", "Set labels=sampled or labels=data.")
    if not 0 < cfg.temperature < float("inf"):
        raise ConfigError("temperature", cfg.temperature, "must be above 0 and finite", "Set temperature=4.")
    if cfg.precision not in (None, "bf16", "fp32"):
        raise ConfigError("precision", cfg.precision, "unknown", "Set precision=bf16 or precision=fp32.")
    if Path(cfg.output).suffix != ".npz":
        raise ConfigError("output", cfg.output, "is no .npz file", "Name one, such as runs/semsa/profile.npz.")
    lacks_verification = cfg.verify > 0 and not verification_file(Path(cfg.output)).exists()
    output = check_output(cfg.output, cfg.overwrite or lacks_verification, such="runs/semsa/profile.npz")
    if cfg.verify and not lacks_verification and not cfg.overwrite:
        problem = f"{verification_file(output)} exists"
        raise ConfigError("verify", cfg.verify, problem, "Add overwrite=true, or set another output.")
    subject = read_subject(
        cfg.checkpoint, cfg.data, seq_length=cfg.seq_length, held_out=False, tp=cfg.tp, seed=cfg.seed,
        attention_backend=cfg.attention_backend, world_size=world_size, hardware=hardware,
    )  # fmt: skip
    ranks = world_size // cfg.tp
    if cfg.samples % ranks:
        problem = f"{ranks} data parallel ranks can't share them evenly"
        raise ConfigError("samples", cfg.samples, problem, f"Set a multiple of {ranks}.")
    block_size = subject.trained.layout.block_size if cfg.block_size is None else cfg.block_size
    if block_size not in BLOCK_SIZES:
        raise ConfigError("block_size", block_size, "not supported", f"Set one of {', '.join(map(str, BLOCK_SIZES))}.")
    if subject.cfg.train.seq_length < 2 * block_size:
        problem = f"sequences of {subject.cfg.train.seq_length} tokens have no two of these blocks"
        raise ConfigError("block_size", block_size, problem, "Set a smaller one.")
    rules = make_library(cfg.library)
    columns = _read_columns(cfg, rules, subject, block_size)
    unfinished = output.with_suffix(_UNFINISHED)
    labels = Labels(cfg.labels, cfg.temperature if cfg.labels == "sampled" else 1.0)
    return Request(subject, labels, block_size, rules, columns, output, unfinished)


def _read_columns(
    cfg: ProfileAttentionConfig, rules: tuple[Rule, ...], subject: Subject, block_size: int
) -> np.ndarray | None:
    takes = any(rule.takes_columns for rule in rules)
    if cfg.columns_from is None:
        if takes:
            problem = "no profile says which columns matter"
            remedy = "Set columns_from to a profile of this checkpoint, made without such rules."
            raise ConfigError("library.columns", cfg.library.columns, problem, remedy)
        return None
    if not takes:
        raise ConfigError("columns_from", cfg.columns_from, "no rule has columns", "Set library.columns=[[4,8]].")
    earlier = load_profile(cfg.columns_from, "columns_from")
    weights = weights_fingerprint(subject.checkpoint)
    check_same_model(earlier, weights, cfg.columns_from, subject.checkpoint, "columns_from")
    length = subject.cfg.train.seq_length
    if earlier.block_size != block_size or earlier.seq_length < length:
        problem = f"it has blocks of {earlier.block_size} and {earlier.seq_length:,} tokens"
        remedy = f"Profile with block_size={block_size} and {length:,} tokens first."
        raise ConfigError("columns_from", cfg.columns_from, problem, remedy)
    blocks = -(-length // block_size)
    local = min(rule.settings["local"] for rule in rules if rule.takes_columns)
    return ranked_columns(earlier.blocks[..., :blocks, :blocks], subject.trained.model.num_query_groups, local)


def verification_file(output: Path) -> Path:
    """Return where the comparison with real masks is written."""
    return output.with_name(f"{output.stem}-verify.json")


def profile_checkpoint(cfg: ProfileAttentionConfig) -> None:
    """Profile a checkpoint, write the file, and verify it if asked; collective.

    Raises:
        ConfigError: a setting can't work; before a process group exists, unless the checkpoint is damaged.
    """
    request = read_request(cfg, int(os.environ.get("WORLD_SIZE", "1")), detect_own())
    subject, is_first = request.subject, os.environ.get("RANK", "0") == "0"
    about = _about(cfg, request)
    ranks = int(os.environ.get("WORLD_SIZE", "1")) // cfg.tp
    is_finished = is_first and _is_finished(cfg, request, about)
    base = _unfinished(request, about, cfg.overwrite, ranks) if is_first and not is_finished else None
    device = initialize(ParallelConfig(tp=cfg.tp), cfg.seed)
    done = _from_rank_0(cfg.samples if is_finished else int(base.about["done"]) if base else 0, device)
    loaded = load_studied(
        subject, device, block_size=request.block_size, tp=cfg.tp, attention_backend=cfg.attention_backend,
        precision=cfg.precision, recompute=cfg.recompute,
    )  # fmt: skip
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    group = parallel_state.get_data_parallel_group()
    num_blocks = -(-subject.cfg.train.seq_length // request.block_size)
    layers = studied_layers(loaded.model)
    sums = Accumulator(layers, request.rules, request.columns, num_blocks, cfg.attention_backend)  # type: ignore[arg-type]
    vocabulary, tokens, began = subject.tokenizer.vocab_size, 0.0, time.perf_counter()
    if is_first:
        resumed = f", resumed after {done}" if done else ""
        heads = subject.trained.model.num_attention_heads
        print(f"profiling {subject.checkpoint}: {len(layers)} layers of {heads} heads, {len(request.rules)} rules, "
              f"{cfg.samples} samples of {subject.cfg.train.seq_length:,} tokens, labels {request.labels}{resumed}",
              flush=True)  # fmt: skip
    for number, sample in enumerate(samples(subject, cfg.samples, held_out=False, rank=rank, ranks=ranks)):
        so_far = (number + 1) * ranks
        if so_far <= done:
            continue
        index = number * ranks + rank
        seed = label_seed(cfg.seed, index)
        losses = token_losses(loaded.model, sample, device, request.labels, vocab_size=vocabulary, seed=seed)
        losses.double().sum().backward()
        tokens += float(sample["loss_mask"].sum())
        if so_far == cfg.samples or (number + 1) % cfg.save_interval == 0:
            total = _total(
                base, sums, tokens, group, device, about | {"done": so_far, "data_parallel_ranks": ranks}, request
            )
            if is_first:
                if so_far == cfg.samples and cfg.verify:
                    verification_file(request.output).unlink(missing_ok=True)  # of the profile that this one replaces
                total.save(request.output if so_far == cfg.samples else request.unfinished)
                seconds = (time.perf_counter() - began) / (so_far - done)
                left = f", {seconds * (cfg.samples - so_far):.0f} s left" if so_far < cfg.samples else ""
                print(f"sample {so_far}/{cfg.samples}, {seconds:.2f} s each{left}", flush=True)
    if is_first:
        request.unfinished.unlink(missing_ok=True)
        print(f"profile {request.output} (use it: launch/choose_layout.py profile={request.output})", flush=True)
    if cfg.verify:
        from s2train.semsa.verification import verify  # it takes this module's Request

        verify(cfg, request, loaded.model, sums, device, verification_file(request.output))
    shutdown()


def _about(cfg: ProfileAttentionConfig, request: Request) -> dict[str, Any]:
    subject = request.subject
    return about_profile(
        request.rules,
        checkpoint=str(subject.checkpoint),
        weights=weights_fingerprint(subject.checkpoint),
        model=asdict(subject.trained.model),
        seq_length=subject.cfg.train.seq_length,
        block_size=request.block_size,
        samples=cfg.samples,
        labels=request.labels.kind,
        temperature=request.labels.temperature,
        precision=cfg.precision or subject.trained.train.precision,
        seed=cfg.seed,
        data={"path": subject.cfg.data.path, "split": subject.cfg.data.split},
        tokenizer=subject.tokenizer.fingerprint,
        columns_from=cfg.columns_from,
        command=shlex.join(sys.argv),
        environment=environment(),
    )


def _is_finished(cfg: ProfileAttentionConfig, request: Request, about: Mapping[str, Any]) -> bool:
    """Return whether an earlier run of this command lacks its verification alone.

    Raises:
        ConfigError: the output is another profile, and `overwrite` is off.
    """
    if not request.output.exists() or not cfg.verify or verification_file(request.output).exists():
        return False
    try:
        others = _others(load_profile(request.output, "output"), about)
    except ConfigError:
        if cfg.overwrite:
            return False
        raise
    if others and not cfg.overwrite:
        problem = f"exists, and was made with another {', '.join(others)}"
        raise ConfigError("output", request.output, problem, "Add overwrite=true, or set another file.")
    return not others


def _others(earlier: Profile, about: Mapping[str, Any]) -> list[str]:
    """Name what a profile was made with and `about` has otherwise."""
    asked = json.loads(json.dumps(dict(about)))
    return [name for name in asked if name not in _MAY_DIFFER and earlier.about.get(name) != asked[name]]


def _unfinished(request: Request, about: Mapping[str, Any], overwrite: bool, ranks: int) -> Profile | None:
    """Read what an interrupted run of the same command has summed.

    `overwrite` keeps it, so that a command restarted after preemption resumes, and drops that of another command.
    """
    if not request.unfinished.exists():
        return None
    base = load_profile(request.unfinished, "output")
    others = _others(base, about)
    if others and overwrite:
        request.unfinished.unlink()
        return None
    if others:
        problem = f"{request.unfinished} is unfinished, and was made with another {', '.join(others)}"
        raise ConfigError("output", request.output, problem, "Set another file, or overwrite=true to start again.")
    if (done := int(base.about["done"])) % ranks:  # samples go to ranks in rounds
        problem = f"{request.unfinished} holds {done} samples, which {ranks} data parallel ranks don't divide"
        raise ConfigError("output", request.output, problem, "Start other ranks, or remove that file to start again.")
    return base


def _total(
    base: Profile | None,
    sums: Accumulator,
    tokens: float,
    group: torch.distributed.ProcessGroup,
    device: torch.device,
    about: dict[str, Any],
    request: Request,
) -> Profile:
    """Add the sums of all ranks and the saved ones; collective.

    Only rank 0's result includes what was saved before.
    """
    blocks, rules = sums.sums(group)
    counted = torch.tensor([tokens], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(counted, group=group)
    if base is not None:
        blocks, rules = blocks + base.blocks, rules + base.rules
    about |= {"tokens": int(counted) + (base.tokens if base else 0)}
    return Profile(blocks, rules, request.columns, about)


def _from_rank_0(number: int, device: torch.device) -> int:
    shared = torch.tensor([number], device=device)
    torch.distributed.broadcast(shared, 0)
    return int(shared)
