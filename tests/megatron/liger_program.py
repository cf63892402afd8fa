"""Trains small random models once by Megatron's kernels and once by Liger-Kernel's; prints the differences as JSON.

In a separate process, since Megatron's groups and its CPU mode are global; under torchrun tensor parallel.
"""

import json
import sys
from dataclasses import replace
from statistics import mean
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from s2train.kernels.interpreter import repair_interpreter
from s2train.kernels.relative_error import relative_error

from s2train.config import ModelConfig, ParallelConfig, PretrainConfig, TrainConfig
from s2train.environment.liger import liger_operations
from s2train.megatron.core_attention import packed_documents
from s2train.megatron.layer_backends import choose_backend
from s2train.megatron.model import build_model, transformer_config, unwrap
from s2train.megatron.rotation import RotatingSelfAttention
from s2train.megatron.setup import initialize, shutdown
from s2train.megatron.summed_norm import SumBefore
from tests.inference.cached_models import BLOCK, VOCABULARY, hybrid_of
from tests.inference.cached_program import positions_like
from tests.megatron.interpreted_liger import repair_liger

LENGTH = BLOCK + 4
# A dense layer and a sparse one: each takes seconds in the interpreter.
LAYOUT = replace(hybrid_of("hybrid"), layers=hybrid_of("hybrid").layers[:2])
repair_interpreter()  # Liger-Kernel's loops need it too
repair_liger()


def build(cfg: PretrainConfig, elementwise: str, device: torch.device) -> GPTModel:
    operations = liger_operations(replace(cfg, elementwise=elementwise), None, te=False)
    backend = choose_backend("local", operations)
    (chunk,) = build_model(cfg, transformer_config(cfg), LAYOUT, backend, device)
    return unwrap(chunk)


def compare(cfg: PretrainConfig, loss: str, packed: bool, device: torch.device) -> dict[str, tuple[float, float]]:
    """Relative errors against Megatron's kernels in fp32: Liger-Kernel's, and Megatron's in the run's precision."""
    exact = build(replace(cfg, loss="torch", train=replace(cfg.train, precision="fp32")), "torch", device)
    plain = build(replace(cfg, loss="torch"), "torch", device)
    liger = build(replace(cfg, loss=loss), "liger", device)
    splits = {module.splits for module in liger.modules() if isinstance(module, RotatingSelfAttention)}
    assert splits == {not cfg.model.qk_norm}
    fused = {"none": 4, "selective": 4, "full": 2, "mlp": 0}  # sums of two layers
    sums = [sum_of for layer in liger.decoder.layers for sum_of in (layer.self_attn_bda, layer.mlp_bda)]
    assert sum(isinstance(sum_of, SumBefore) for sum_of in sums) == fused[cfg.train.recompute]
    assert list(plain.state_dict()) == list(liger.state_dict())
    for gpt in (liger, exact):
        gpt.load_state_dict(plain.state_dict())
    tokens, labels = torch.randint(0, VOCABULARY, (2, 2, LENGTH), device=device)
    weights = torch.rand(2, LENGTH, device=device)
    bounds = torch.tensor([[0, 3, LENGTH]] * 2, dtype=torch.int32, device=device)
    more = {"packed_seq_params": packed_documents(bounds, LENGTH)} if packed else {}

    def results(gpt: GPTModel) -> list[torch.Tensor]:
        losses = gpt(tokens, positions_like(tokens), None, labels=labels, **more)
        (losses * weights).sum().backward()
        return [losses.detach(), torch.cat([p.grad.flatten().float() for p in gpt.parameters() if p.grad is not None])]

    expected, *others = map(results, (exact, liger, plain))
    errors = [tuple(relative_error(x, y) for x in found) for *found, y in zip(*others, expected, strict=True)]
    return dict(zip(("losses", "gradients"), errors, strict=True))


def mean_of_draws(draws: int, *case: Any) -> dict[str, tuple[float, float]]:
    """Mean errors of some comparisons: in bf16 those of one small model differ much between draws."""
    drawn = [compare(*case) for _ in range(draws)]
    return {name: (mean(one[name][0] for one in drawn), mean(one[name][1] for one in drawn)) for name in drawn[0]}


def main() -> None:
    """Arguments: seed, tensor parallel size."""
    seed, tp = map(int, sys.argv[1:])
    parallel = ParallelConfig(tp=tp, sequence_parallel=tp > 1)
    device = initialize(parallel, 1)
    torch.manual_seed(seed)  # the same data on every rank
    model = ModelConfig("test", len(LAYOUT.layers), 64, 96, 4, 2, 16, VOCABULARY, init_std=0.2)
    train = TrainConfig(steps=1, seq_length=LENGTH, global_batch_size=1, precision="fp32")
    cfg = PretrainConfig(model=model, parallel=parallel, train=train, attention_backend="torch")
    turning_in_half = replace(cfg, model=replace(model, rotary_percent=0.5))
    cases = {"packed documents": (cfg if tp > 1 else turning_in_half, "liger", True)}
    if tp == 1:
        full, selective, mlp = (
            replace(cfg, train=replace(train, recompute=name)) for name in ("full", "selective", "mlp")
        )
        tied = replace(selective, model=replace(model, tie_embeddings=True, qk_norm=True))
        cases |= {
            "loss over logits, MLP recomputed": (mlp, "liger", False),
            "loss over hidden states, full recomputation": (full, "linear", False),
            "tied embeddings, normalized queries, selective recomputation": (tied, "linear", False),
        }
    found = {name: compare(*case, device) for name, case in cases.items()}
    if tp == 1:
        rounded = replace(cfg, train=replace(train, precision="bf16"))
        found["bf16, loss in place"] = mean_of_draws(4, rounded, "in_place", False, device)
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found))
    shutdown()


if __name__ == "__main__":
    main()
