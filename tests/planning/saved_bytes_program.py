"""Builds models, and measures the most bytes that autograd saves at once; prints JSON.

In a separate process, since Megatron's groups and its CPU mode are global.
"""

import json
import sys
from collections import Counter

import torch
from torch import Tensor

from s2train.costs.activations import stage_activations
from s2train.costs.implementations import Implementations
from s2train.costs.parameters import total_parameters
from s2train.megatron.layer_backends import choose_backend
from s2train.megatron.model import build_model, transformer_config
from s2train.megatron.setup import initialize, shutdown
from s2train.planning import compose_run, hybrid_layout


class Saved:
    """Counts storages that autograd holds, apart from the weights'."""

    def __init__(self, weights: set[int]) -> None:
        self.weights, self.holders = weights, Counter[int]()
        self.now = self.most = 0

    def hold(self, tensor: Tensor) -> "Tensor | Held":
        return tensor if tensor.untyped_storage().data_ptr() in self.weights else Held(self, tensor)


class Held:
    """A saved tensor, until autograd needs it no more."""

    def __init__(self, saved: Saved, tensor: Tensor) -> None:
        self.saved, self.tensor = saved, tensor
        self.where, self.nbytes = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        saved.holders[self.where] += 1
        saved.now += self.nbytes * (saved.holders[self.where] == 1)
        saved.most = max(saved.most, saved.now)

    def __del__(self) -> None:
        self.saved.holders[self.where] -= 1
        self.saved.now -= self.nbytes * (self.saved.holders[self.where] == 0)


def measure(overrides: list[str], device: torch.device) -> dict[str, tuple[int, int]]:
    """Parameters and activation bytes of a run: measured, and planned."""
    cfg = compose_run(overrides)
    layers = hybrid_layout(cfg).layers
    (model,) = build_model(cfg, transformer_config(cfg), hybrid_layout(cfg), choose_backend("local"), device)
    saved = Saved({p.untyped_storage().data_ptr() for p in model.parameters()})
    shape = cfg.train.micro_batch_size, cfg.train.seq_length
    tokens = torch.randint(0, 256, shape)
    with torch.autograd.graph.saved_tensors_hooks(saved.hold, lambda held: getattr(held, "tensor", held)):
        model(tokens, torch.arange(shape[1]).expand(shape), None, labels=tokens).sum().backward()
    assert saved.now == 0
    return {
        "parameters": (sum(p.numel() for p in model.parameters()), total_parameters(cfg.model, layers)),
        "activations": (saved.most, stage_activations(cfg, 0, (layers,), 1, "cpu", Implementations())),
    }


def main() -> None:
    """Argument: settings of each run, as JSON."""
    runs = json.loads(sys.argv[1])
    device = initialize(compose_run(runs[0]).parallel, seed=1)
    results = [measure(overrides, device) for overrides in runs]
    shutdown()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
