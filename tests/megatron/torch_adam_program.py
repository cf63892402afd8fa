"""Prints as JSON how torch's AdamW trains with and without its fused kernel, also from the other's checkpoint.

Used by tests/megatron/test_torch_adam.py. A CPU has the fused kernel too.
"""

import json
import tempfile
from typing import Any
from unittest import mock

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer

from s2train.checkpoints.folders import Progress
from s2train.checkpoints.run_state import Saver, TrainingState, load
from s2train.config import PretrainConfig
from s2train.megatron.layer_backends import backend_of
from s2train.megatron.model import build_model, transformer_config
from s2train.megatron.optimizer_state import implementations, optimizer_parts
from s2train.megatron.setup import initialize, shutdown
from s2train.megatron.torch_adam import fuse
from s2train.planning import compose_run, hybrid_layout
from s2train.training.optimizer import build_optimizer, gradient_norm, take_step, wrap_data_parallel
from tests.program import SMALL

TINY = ["layout.layers=D", "model.num_layers=1", "optim.lr=1e-2", "train.steps=8", "layer_backend=local"]
PLAIN = "parallel.distributed_optimizer=false"
CASES = {
    "distributed": ["train.precision=bf16"],
    "plain": [PLAIN, "train.precision=fp32"],
    "plain, bf16": [PLAIN, "train.precision=bf16"],
}
BEFORE, AFTER = 3, 6  # the checkpoint's step, and the last one


def fuse_all(optimizer: MegatronOptimizer) -> None:
    """Fuse as on GPUs."""
    for part in optimizer_parts(optimizer):
        fuse(part.optimizer)


def drawn(step: int, number: int, like: torch.Tensor) -> torch.Tensor:
    """Normal values, of any device."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(100 * step + number))


class Training:
    """A model whose weights and gradients are drawn by step."""

    def __init__(self, cfg: PretrainConfig, device: torch.device, is_fused: bool) -> None:
        config = transformer_config(cfg)
        models = build_model(cfg, config, hybrid_layout(cfg), backend_of(cfg), device)
        for number, parameter in enumerate(models[0].parameters()):
            parameter.data.copy_(drawn(0, number, parameter))
        chunks = wrap_data_parallel(cfg, config, models)
        choice = fuse_all if is_fused else lambda optimizer: None
        with mock.patch("s2train.training.optimizer.fuse_on_gpus", choice):
            self.state = TrainingState(chunks, *build_optimizer(cfg, config, chunks))

    def train(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            for number, parameter in enumerate(self.state.chunks[0].parameters()):
                parameter.main_grad.copy_(10.0 ** (number % 3 - 4) * drawn(step, number, parameter))
            take_step(self.state.optimizer, gradient_norm(self.state.optimizer))
            self.state.scheduler.step(increment=1)

    def weights(self) -> torch.Tensor:
        """fp32, of the optimizer."""
        groups = self.state.optimizer.param_groups
        return torch.cat([parameter.detach().flatten().float() for group in groups for parameter in group["params"]])


def tensors_in(state: Any) -> list[torch.Tensor]:
    """All tensors of a state, of any nesting."""
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []
    return [tensor for value in values for tensor in tensors_in(value)]


def compare(cfg: PretrainConfig, device: torch.device) -> list[dict[str, Any]]:
    """Train with each kernel; save, and resume with each."""
    found, weights = [], {}
    for before in (True, False):
        training = Training(cfg, device, before)
        start = training.weights()
        training.train(1, BEFORE)
        cfg.run_dir = tempfile.mkdtemp(dir=folder)
        saver = Saver(cfg, training.state, lambda step, path: None)
        checkpoint = saver.save(Progress(BEFORE, 0, {}, None))
        saver.close()
        training.train(BEFORE + 1, AFTER)
        weights[before] = training.weights()
        common = tensors_in(dist_checkpointing.load_common_state_dict(str(checkpoint))["optimizer"])
        for after in (True, False):
            resumed = Training(cfg, device, after)
            load(cfg, resumed.state, checkpoint, None)
            names = implementations(resumed.state.optimizer)
            resumed.train(BEFORE + 1, AFTER)
            found.append(
                {
                    "before": before,
                    "after": after,
                    "name": names,
                    "weights": resumed.weights(),
                    "devices": sorted({tensor.device.type for tensor in common}),
                }
            )
    for one in found:
        own, other = (weights[kind] for kind in (one["before"], not one["before"]))
        resumed = one.pop("weights")
        one["is_exact"] = bool((resumed == own).all())
        one["moved"] = float((own - start).abs().mean())
        one["apart"] = float(max((weight - other).abs().max() for weight in (resumed, own)))
        one["tolerance"] = AFTER * torch.finfo(torch.float32).eps * float(own.abs().max())
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        cfgs = {name: compose_run([*SMALL, *TINY, *own, "run_dir=none"]) for name, own in CASES.items()}
        device = initialize(next(iter(cfgs.values())).parallel, 1234)
        print(json.dumps({name: compare(cfg, device) for name, cfg in cfgs.items()}))
        shutdown()
