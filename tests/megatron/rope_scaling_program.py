"""Measures what scaled rotations do to queries and keys of small random models; prints errors as JSON.

In a separate process, since Megatron's groups and its CPU mode are global. Arguments: seed.
"""

import json
import random
import sys
from dataclasses import replace

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from s2train.kernels.interpreter import repair_interpreter
from s2train.kernels.relative_error import largest, relative_error
from torch import Tensor

from s2train.config import ModelConfig, ParallelConfig, PretrainConfig, TrainConfig
from s2train.environment.liger import ROTATION, liger_problem
from s2train.inference.cached_model import CachedModel
from s2train.inference.kv_cache import kv_cache
from s2train.megatron.core_attention import CausalCoreAttention
from s2train.megatron.layer_backends import choose_backend
from s2train.megatron.model import build_model, transformer_config, unwrap
from s2train.megatron.setup import initialize, shutdown
from s2train.rope_scaling import RopeScalingConfig
from s2train.validation.rope_scaling import check_rope_scaling
from tests.inference.cached_models import BLOCK, VOCABULARY, hybrid_of
from tests.inference.cached_program import positions_like
from tests.megatron.rope_oracle import factor_of_cosines, frequencies

LENGTH = 2 * BLOCK + 3
LAYOUT = replace(hybrid_of("hybrid"), layers=hybrid_of("hybrid").layers[:2])
HEAD = 16
# A cache and Liger-Kernel, which is interpreted here, see only cosines and sines: one scaling of each kind.
OF_EACH_KIND = ("linear", "llama3", "yarn", "yarn with a set temperature")
repair_interpreter()


def scalings() -> dict[str, RopeScalingConfig]:
    factor, length = random.uniform(1.5, 16), random.randint(40, 9000)
    return {
        "none": RopeScalingConfig(),
        "linear": RopeScalingConfig("linear", factor),
        "llama3": RopeScalingConfig("llama3", factor, length),
        "llama3 of other bounds": RopeScalingConfig("llama3", factor, length, low_freq_factor=2, high_freq_factor=9),
        "yarn": RopeScalingConfig("yarn", factor, length),
        "yarn of other bounds": RopeScalingConfig("yarn", factor, length, beta_fast=20, beta_slow=2, truncate=False),
        "yarn with a set temperature": RopeScalingConfig("yarn", factor, length, attention_factor=0.75),
        "yarn without temperature": RopeScalingConfig("yarn", factor, length, attention_factor=1),
    }


def build(cfg: PretrainConfig, operations: tuple[str, ...], device: torch.device) -> GPTModel:
    backend = choose_backend("local", frozenset(operations))
    (chunk,) = build_model(cfg, transformer_config(cfg), LAYOUT, backend, device)
    return unwrap(chunk).eval()


def rotated(x: Tensor, cfg: PretrainConfig) -> Tensor:
    """Rotate [s, b, h, d] in float64, by the papers."""
    model, factor = cfg.model, factor_of_cosines(cfg.model.rope_scaling)
    dim = int(HEAD * model.rotary_percent)
    per_token = torch.tensor(frequencies(dim, model.rotary_base, model.rope_scaling), dtype=torch.float64)
    angles = torch.outer(torch.arange(len(x), dtype=torch.float64), per_token)[:, None, None]
    low, high, still = x.double().split([dim // 2, dim // 2, HEAD - dim], -1)
    turned = torch.view_as_complex(torch.stack((low, high), -1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real * factor, turned.imag * factor, still], -1)


@torch.no_grad()
def error(gpt: GPTModel, cfg: PretrainConfig) -> float:
    """Relative error of the first layer's queries and keys, as its core attention gets them."""
    seen: dict[str, tuple[Tensor, ...]] = {}
    attention = gpt.decoder.layers[0].self_attention
    attention.linear_qkv.register_forward_hook(lambda *call: seen.__setitem__("projected", call[2][0].clone()))
    attention.core_attention.register_forward_pre_hook(lambda _, inputs: seen.__setitem__("turned", inputs[:2]))
    tokens = torch.randint(0, VOCABULARY, (2, LENGTH))
    gpt(tokens, positions_like(tokens), None)
    groups, per_group = cfg.model.num_query_groups, cfg.model.num_attention_heads // cfg.model.num_query_groups
    projected = seen["projected"].view(LENGTH, 2, groups, (per_group + 2) * HEAD)
    query, key, _ = projected.split([per_group * HEAD, HEAD, HEAD], -1)
    expected = [rotated(query.reshape(LENGTH, 2, -1, HEAD), cfg), rotated(key, cfg)]
    return largest(relative_error(x, y) for x, y in zip(seen["turned"], expected, strict=True))


@torch.no_grad()
def cached_error(gpt: GPTModel) -> float:
    """Relative error of logits over a cache, decoded one by one, against those without."""
    gpt.parallel_output, gpt.output_layer.gather_output = False, True
    tokens = torch.randint(0, VOCABULARY, (2, LENGTH))
    plain = gpt(tokens, positions_like(tokens), None)
    start = LENGTH - 4
    with kv_cache(gpt, 2, LENGTH) as cache:
        model = CachedModel(gpt, cache)
        found = [model.prefill(tokens[:, :start], chunk=BLOCK)]
        found += [model.decode(tokens[:, at]) for at in range(start, LENGTH)]
    whole = torch.stack(found, 1)
    return relative_error(whole, plain[:, start - 1 :])


def main() -> None:
    random.seed(int(sys.argv[1]))
    device = initialize(ParallelConfig(), 1)
    torch.manual_seed(int(sys.argv[1]))
    found: dict[str, dict[str, float]] = {}
    for name, scaling in scalings().items():
        percent, base = random.choice([0.5, 1.0]), random.choice([100, 10_000, 500_000])
        model = ModelConfig("test", 2, 64, 96, 4, 2, HEAD, VOCABULARY, base, percent, init_std=0.2)
        model.rope_scaling = scaling
        check_rope_scaling(model)
        train = TrainConfig(steps=1, seq_length=LENGTH, global_batch_size=1, precision="fp32")
        cfg = PretrainConfig(model=model, train=train, attention_backend="torch")
        plain = build(cfg, (), device)
        found[name] = {"plain": error(plain, cfg)}
        if name not in OF_EACH_KIND:
            continue
        found[name]["cached"] = cached_error(plain)
        if liger_problem() is None:
            found[name]["liger"] = error(build(cfg, (ROTATION,), device), cfg)
    assert all(isinstance(layer.self_attention.core_attention, CausalCoreAttention) for layer in plain.decoder.layers)
    print(json.dumps(found))
    shutdown()


if __name__ == "__main__":
    main()
