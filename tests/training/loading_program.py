"""Prints as JSON what each rank requests of the optimizer's state when it loads a checkpoint, and what it saves.

Used by tests/megatron/test_local_optimizer_state.py, which names a folder for checkpoints.
"""

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint import FileSystemReader

from s2train.checkpoints import shard_index
from s2train.checkpoints.folders import Progress
from s2train.checkpoints.run_state import Saver, TrainingState, load, sharded_state
from s2train.checkpoints.shards import sharding_metadata
from s2train.config import PretrainConfig
from s2train.errors import ConfigError
from s2train.megatron.layer_backends import backend_of
from s2train.megatron.local_optimizer_state import distributed_parts, load_only_local_state
from s2train.megatron.model import build_model, transformer_config
from s2train.megatron.setup import initialize, shutdown
from s2train.planning import compose_run, hybrid_layout
from s2train.training import optimizer as optimizers
from s2train.training.optimizer import (
    build_optimizer,
    gradient_norm,
    take_step,
    up_to_date_parameters,
    wrap_data_parallel,
)
from tests.program import SMALL


class Copying(torch.optim.AdamW):
    """Stands for transformer-engine's Adam, which copies all moments when it loads."""

    def load_state_dict(self, state_dict: object) -> None:
        raise AssertionError("copied")


def padded_state(cfg: PretrainConfig, device: torch.device) -> TrainingState:
    """State in which each parameter has a bucket, which is padded where its size is odd."""
    config = transformer_config(cfg)
    models = build_model(cfg, config, hybrid_layout(cfg), backend_of(cfg), device)
    small = partial(optimizers.DistributedDataParallelConfig, bucket_size=1)
    with mock.patch.object(optimizers, "DistributedDataParallelConfig", small):
        chunks = wrap_data_parallel(cfg, config, models)
    optimizer, scheduler = build_optimizer(cfg, config, chunks)
    (part,) = distributed_parts(optimizer)
    assert any(bucket.numel_unpadded < bucket.grad_data.numel() for bucket in part.buffers[0].buckets)
    return TrainingState(chunks, optimizer, scheduler)


def saved_elsewhere(state: TrainingState) -> list[int]:
    """Numbers of parameters whose saved fp32 copy is not theirs: gathered over NCCL's path, and over gloo's."""
    (part,) = distributed_parts(state.optimizer)
    parameters, found = [p for buffer in part.buffers for p in buffer.param_index_map], []
    for over_gloo in (False, True):
        metadata = sharding_metadata() | {"distrib_optim_fully_reshardable_mem_efficient": over_gloo}
        saved = sharded_state(state, metadata, is_loading=False)["optimizer"]["param_state"] or {}
        found.append(sum(not copies["param"].data.equal(parameters[i].float()) for i, copies in saved.items()))
    return found


def resumed(cfg: PretrainConfig, state: TrainingState, *, as_megatron_saves: bool) -> tuple[str, int]:
    """Take a step, save, and load what was saved; returns the error, if any, and how often it read the index."""
    (part,) = distributed_parts(state.optimizer)
    for parameter in state.chunks[0].parameters():
        parameter.main_grad.normal_()
    take_step(state.optimizer, gradient_norm(state.optimizer))
    with ExitStack() as stack:
        stack.enter_context(up_to_date_parameters(cfg, state.chunks))
        if as_megatron_saves:
            name = "sharded_param_state_fully_reshardable"
            stack.enter_context(mock.patch.object(part, name, partial(getattr(DistributedOptimizer, name), part)))
        saved = Saver(cfg, state, lambda step, path: None).save(Progress(1, 8, {}, None))
    problem = ""
    with mock.patch.object(shard_index, "FileSystemReader", wraps=FileSystemReader) as reader:
        try:
            load(cfg, state, saved, None)
        except ConfigError as error:
            problem = str(error)
    return problem, reader.call_count


def main() -> None:
    cfg = compose_run([*SMALL, "run_dir=none", "train.steps=4"])
    device = initialize(cfg.parallel, cfg.seed)
    config = transformer_config(cfg)
    models = build_model(cfg, config, hybrid_layout(cfg), backend_of(cfg), device)
    chunks = wrap_data_parallel(cfg, config, models)
    optimizer, scheduler = build_optimizer(cfg, config, chunks)
    (part,) = distributed_parts(optimizer)
    part.optimizer.__class__ = Copying
    load_only_local_state(optimizer)
    moments = [state["exp_avg"].data_ptr() for state in part.optimizer.state.values()]
    state = TrainingState(chunks, optimizer, scheduler)
    wanted = sharded_state(state, sharding_metadata(), is_loading=True)["optimizer"]["param_state"]
    kept = sum(parameter.numel() for group in part.optimizer.param_groups for parameter in group["params"])
    errors, reads = {}, {}
    for precision in ("bf16", "fp32"):
        for as_megatron_saves in (False, True):
            name = f"{precision}{' shifted' if as_megatron_saves else ''}"
            own = replace(
                cfg,
                run_dir=f"{sys.argv[1]}/{name.replace(' ', '-')}",
                train=replace(cfg.train, precision=precision),
            )
            errors[name], reads[name] = resumed(own, padded_state(own, device), as_megatron_saves=as_megatron_saves)
    mine = {
        "asked": sum(value.data.numel() for value in nested_values(wanted)),
        "largest": max(parameter.numel() for parameter in models[0].parameters()),
        "kept": kept,
        "parameters": sum(parameter.numel() for parameter in models[0].parameters()),
        "saved_elsewhere": saved_elsewhere(padded_state(cfg, device)),
        "errors": errors,
        "index_reads": reads,
        "is_copied": moments != [state["exp_avg"].data_ptr() for state in part.optimizer.state.values()],
    }
    ranks: list[object] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, mine)
    if torch.distributed.get_rank() == 0:
        print(json.dumps(ranks))
    shutdown()


if __name__ == "__main__":
    main()
