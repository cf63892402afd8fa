"""Profiles a checkpoint on calibration text.

It runs forward and backward, and saves the sums so far to resume from.
"""

import json
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from megatron.core import parallel_state

from s2train.command_line.commands import shell_setting
from s2train.config import ParallelConfig
from s2train.distributed.agreement import broadcast_from_rank_0
from s2train.distributed.ranks import is_rank_0, world_size
from s2train.environment.hardware import detect_own
from s2train.environment.provenance import environment
from s2train.errors import ConfigError
from s2train.megatron.setup import initialize, shutdown
from s2train.needles.results import weights_fingerprint
from s2train.semsa.accumulation import Accumulator
from s2train.semsa.calibration import label_seed, load_studied, samples, token_losses
from s2train.semsa.config import ProfileAttentionConfig
from s2train.semsa.core_attention import studied_layers
from s2train.semsa.profile import Profile, about_profile, load_profile
from s2train.semsa.profile_request import Request, read_request, verification_file

# Of `Profile.about`, what another start of the same command may have otherwise.
_MAY_DIFFER = ("done", "tokens", "command", "environment", "data_parallel_ranks")


def profile_checkpoint(cfg: ProfileAttentionConfig) -> None:
    """Profile a checkpoint, write the file, and verify it if asked; collective.

    Raises:
        ConfigError: a setting can't work; before a process group exists, unless the checkpoint is damaged.
    """
    request = read_request(cfg, world_size(), detect_own())
    subject, is_first = request.subject, is_rank_0()
    about = _about(cfg, request)
    ranks = world_size() // cfg.tp
    is_finished = is_first and _is_finished(cfg, request, about)
    base = _unfinished(request, about, cfg.overwrite, ranks) if is_first and not is_finished else None
    device = initialize(ParallelConfig(tp=cfg.tp), cfg.seed)
    done = broadcast_from_rank_0(cfg.samples if is_finished else int(base.about["done"]) if base else 0)
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
        use = f"launch/choose_layout.py {shell_setting('profile', request.output)}"
        print(f"profile {request.output} (use it: {use})", flush=True)
    if cfg.verify:
        from s2train.semsa.verification import verify  # matplotlib: slow

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
    """Name what a profile was made with and `about` has otherwise.

    Settings of the model that an earlier version did not have, have their defaults.
    """
    made, asked = (
        json.loads(json.dumps(values))
        for values in (dict(earlier.about) | {"model": asdict(earlier.model)}, dict(about))
    )
    return [name for name in asked if name not in _MAY_DIFFER and made.get(name) != asked[name]]


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
