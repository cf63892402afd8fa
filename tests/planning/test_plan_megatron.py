"""The plan against the real model: what Megatron builds, and what autograd saves."""

import json
from pathlib import Path

import pytest

from tests.program import run

pytestmark = [pytest.mark.slow]

# In a separate process, since Megatron's groups and its CPU mode are global.
MEASURE = """
import json, sys
import torch
from s2train.megatron.layer_backends import choose_backend
from s2train.megatron.model import build_model, transformer_config
from s2train.megatron.setup import initialize, shutdown
from s2train.planning import compose_run, hybrid_layout
from s2train.costs.memory import stage_activations
from s2train.costs.parameters import total_parameters

results, device = [], None
for overrides in json.loads(sys.argv[1]):
    cfg = compose_run(overrides)
    device = device or initialize(cfg.parallel, seed=1)
    model, = build_model(cfg, transformer_config(cfg), hybrid_layout(cfg), choose_backend("local"), device)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved, alive = {}, []
    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is used twice
        return tensor
    shape = cfg.train.micro_batch_size, cfg.train.seq_length
    tokens = torch.randint(0, 256, shape)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = model(tokens, torch.arange(shape[1]).expand(shape), None, labels=tokens)
    results.append(dict(
        parameters=(sum(p.numel() for p in model.parameters()), total_parameters(cfg.model, hybrid_layout(cfg).layers)),
        activations=(sum(saved.values()), stage_activations(cfg, 0, (hybrid_layout(cfg).layers,), 1, "cpu")),
    ))
shutdown()
print(json.dumps(results))
"""
VARIANTS = [
    ["+model=tiny_dense"],
    ["+model=tiny_hybrid", "model.tie_embeddings=false", "model.head_dim=16"],
    ["+model=tiny_hybrid", "train.recompute=selective", "train.micro_batch_size=4"],
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[int]]]:
    program: Path = tmp_path_factory.mktemp("program") / "measure.py"
    program.write_text(MEASURE)
    done = run(str(program), json.dumps(VARIANTS), processes=0)
    assert done.status == 0, done.err
    found: list[dict[str, list[int]]] = json.loads(done.out.splitlines()[-1])
    return found


@pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=lambda i: " ".join(VARIANTS[i]))
def test_parameters_are_those_of_the_model_that_is_built(measured: list[dict[str, list[int]]], variant: int) -> None:
    built, planned = measured[variant]["parameters"]
    assert planned == built


@pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=lambda i: " ".join(VARIANTS[i]))
def test_activations_are_estimated_closely_from_above(measured: list[dict[str, list[int]]], variant: int) -> None:
    saved, planned = measured[variant]["activations"]
    assert 0.8 * planned < saved <= planned
