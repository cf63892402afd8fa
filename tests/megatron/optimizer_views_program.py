"""Prints as JSON how steps differ from Megatron's own, on two ranks.

Used by tests/megatron/test_optimizer_views.py.
"""

import json
from typing import Any
from unittest import mock

import torch

from s2train.config import PretrainConfig
from s2train.megatron.layer_backends import backend_of
from s2train.megatron.model import build_model, transformer_config
from s2train.megatron.optimizer_state import optimizer_parts
from s2train.megatron.setup import initialize, shutdown
from s2train.planning import compose_run, hybrid_layout
from s2train.training.optimizer import build_optimizer, gradient_norm, take_step, wrap_data_parallel
from tests.program import SMALL

TINY = ["layout.layers=D", "model.num_layers=1", "optim.lr=1e-2", "layer_backend=local", "run_dir=none"]
TINY += ["train.steps=9", "parallel.overlap_param_gather=false", "optim.clip_grad=30"]
SCALES = (1.0, 1e-3, 1.0, 1e-3, 1e-3)  # of the steps' gradients: above and below the limit
MOVED = 2  # the step before which a gradient moves to other memory


class Training:
    """Steps on drawn gradients, by Megatron's functions or by ours."""

    def __init__(self, cfg: PretrainConfig, device: torch.device, by_megatron: bool) -> None:
        config = transformer_config(cfg)
        models = build_model(cfg, config, hybrid_layout(cfg), backend_of(cfg), device)
        self._draw = torch.Generator().manual_seed(7)
        self.parameters = list(models[0].parameters())
        for parameter in self.parameters:
            parameter.data.normal_(generator=self._draw)
        chunks = wrap_data_parallel(cfg, config, models)
        if by_megatron:
            with mock.patch("s2train.training.optimizer.keep_views"):
                self.optimizer, _ = build_optimizer(cfg, config, chunks)
        else:
            self.optimizer, _ = build_optimizer(cfg, config, chunks)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-2
        self._by_megatron = by_megatron
        self.norms = [self.step(number, scale) for number, scale in enumerate(SCALES)]

    def step(self, number: int, scale: float) -> float:
        """Returns the gradient's norm."""
        self.optimizer.zero_grad()
        if number == MOVED:
            for parameter in self.parameters[::2]:
                parameter.main_grad = torch.empty_like(parameter.main_grad)
        for parameter in self.parameters:
            parameter.main_grad.normal_(0, scale, generator=self._draw)
        if self._by_megatron:
            return float(self.optimizer.step()[1])
        norm = gradient_norm(self.optimizer)
        take_step(self.optimizer, norm)
        return norm

    def masters(self) -> list[torch.Tensor]:
        """The optimizer's weights."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def compare(cfg: PretrainConfig, device: torch.device) -> dict[str, Any]:
    """Train in both ways; then see what one more step does again."""
    megatron, ours = Training(cfg, device, True), Training(cfg, device, False)
    found = {
        "limit": cfg.optim.clip_grad,
        "norms": [megatron.norms, ours.norms],
        "same weights": same(megatron.parameters, ours.parameters),
        "same masters": same(megatron.masters(), ours.masters()),
        "dtype": str(ours.parameters[0].dtype),
    }
    gradients = [master.grad for master in ours.masters()]
    (part,) = optimizer_parts(ours.optimizer)
    with mock.patch.object(part, "prepare_grads", wraps=part.prepare_grads) as prepare:
        ours.step(len(SCALES), 1.0)
    kept = [master.grad is gradient for master, gradient in zip(ours.masters(), gradients, strict=True)]
    return found | {"prepared": prepare.call_count, "kept views": all(kept)}


if __name__ == "__main__":
    cfg = compose_run([*SMALL, *TINY])
    device, mine = initialize(cfg.parallel, 1234), {}
    for name in ("distributed", "plain"):
        for precision in ("bf16", "fp32"):
            cfg.parallel.distributed_optimizer, cfg.train.precision = name == "distributed", precision
            mine[f"{name}, {precision}"] = compare(cfg, device)
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, mine)
    if torch.distributed.get_rank() == 0:
        print(json.dumps(ranks))
    shutdown()
