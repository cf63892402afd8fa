"""Prints as JSON what each rank requests of the optimizer's state when it loads a checkpoint, and what it saves.

Used by tests/megatron/test_local_optimizer_state.py.
"""

import json
from functools import partial
from unittest import mock

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values

from s2train.checkpoints.folders import sharding_metadata
from s2train.checkpoints.run_state import TrainingState, sharded_state
from s2train.config import PretrainConfig
from s2train.megatron.layer_backends import backend_of
from s2train.megatron.local_optimizer_state import distributed_parts, load_only_local_state
from s2train.megatron.model import build_model, transformer_config
from s2train.megatron.setup import initialize, shutdown
from s2train.planning import compose_run, hybrid_layout
from s2train.training import optimizer as optimizers
from s2train.training.optimizer import build_optimizer, wrap_data_parallel
from tests.program import SMALL


class Copying(torch.optim.AdamW):
    """Stands for transformer-engine's Adam, which copies all moments when it loads."""

    def load_state_dict(self, state_dict: object) -> None:
        raise AssertionError("copied")


def saved_elsewhere(cfg: PretrainConfig, device: torch.device) -> list[int]:
    """Numbers of parameters whose saved fp32 copy is not theirs: gathered over NCCL's path, and over gloo's.

    Each parameter has a bucket, which is padded where its size is odd.
    """
    config = transformer_config(cfg)
    models = build_model(cfg, config, hybrid_layout(cfg), backend_of(cfg), device)
    small = partial(optimizers.DistributedDataParallelConfig, bucket_size=1)
    with mock.patch.object(optimizers, "DistributedDataParallelConfig", small):
        chunks = wrap_data_parallel(cfg, config, models)
    optimizer, scheduler = build_optimizer(cfg, config, chunks)
    (part,) = distributed_parts(optimizer)
    assert any(bucket.numel_unpadded < bucket.grad_data.numel() for bucket in part.buffers[0].buckets)
    parameters, found = [p for buffer in part.buffers for p in buffer.param_index_map], []
    for over_gloo in (False, True):
        metadata = sharding_metadata() | {"distrib_optim_fully_reshardable_mem_efficient": over_gloo}
        state = TrainingState(chunks, optimizer, scheduler)
        saved = sharded_state(state, metadata, is_loading=False)["optimizer"]["param_state"] or {}
        found.append(sum(not copies["param"].data.equal(parameters[i].float()) for i, copies in saved.items()))
    return found


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
    mine = {
        "asked": sum(value.data.numel() for value in nested_values(wanted)),
        "largest": max(parameter.numel() for parameter in models[0].parameters()),
        "kept": kept,
        "parameters": sum(parameter.numel() for parameter in models[0].parameters()),
        "saved_elsewhere": saved_elsewhere(cfg, device),
        "is_copied": moments != [state["exp_avg"].data_ptr() for state in part.optimizer.state.values()],
    }
    ranks: list[object] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, mine)
    if torch.distributed.get_rank() == 0:
        print(json.dumps(ranks))
    shutdown()


if __name__ == "__main__":
    main()
