"""Measures each kind of attention against its oracle on one process; prints JSON by kind.

In a separate process, since Megatron's groups and its CPU mode are global.
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from s2train.kernels.relative_error import relative_error
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from s2train.attention.features import Feature
from s2train.attention.registry import register
from s2train.config import LayoutConfig, ModelConfig, ParallelConfig, PatternConfig, PretrainConfig, TrainConfig
from s2train.costs.attention import kept_positions
from s2train.costs.flops import token_flops
from s2train.costs.parameters import attention_shape, total_parameters
from s2train.errors import ConfigError
from s2train.inference.cached_model import CachedModel
from s2train.inference.kv_cache import kv_cache
from s2train.megatron.core_attention import CausalCoreAttention, cores_of, packed_documents
from s2train.megatron.layer_backends import choose_backend
from s2train.megatron.model import build_model, transformer_config, unwrap
from s2train.megatron.setup import initialize, shutdown
from s2train.planning import hybrid_layout
from tests.attention.oracles import ORACLES, Oracle
from tests.attention.toy import ShyKind, ToyKind

LENGTH, BATCH, BLOCK, VOCABULARY = 75, 2, 16, 64


def config_of(oracle: Oracle, recompute: str = "none") -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig("conformance", 2, 32, 48, 4, 2, vocab_size=VOCABULARY, init_std=0.2),
        layout=LayoutConfig(oracle.layers, BLOCK, PatternConfig(local=1, stride=2), kinds=oracle.kinds),
        parallel=ParallelConfig(),
        train=TrainConfig(steps=1, seq_length=LENGTH, global_batch_size=1, precision="fp32", recompute=recompute),
        seed=int(torch.randint(1 << 30, ())),
    )


def build(cfg: PretrainConfig) -> GPTModel:
    backend = choose_backend("local")
    (chunk,) = build_model(cfg, transformer_config(cfg), hybrid_layout(cfg), backend, torch.device("cpu"))
    return unwrap(chunk)


def logits_of(gpt: GPTModel, tokens: Tensor) -> Tensor:
    return gpt(tokens, torch.arange(tokens.shape[1]).expand_as(tokens).contiguous(), None)


def together(weights: Iterable[Tensor]) -> list[Tensor]:
    """The gradients in one tensor; none without weights."""
    gradients = [weight.grad.flatten() for weight in weights if weight.grad is not None]
    return [torch.cat(gradients)] if gradients else []


def random_inputs(core: CausalCoreAttention) -> list[Tensor]:
    heads, groups = core.shape.num_heads, core.shape.num_query_groups
    return [torch.randn(LENGTH, BATCH, count, core.shape.head_dim) for count in (heads, groups, groups)]


def parity(core: CausalCoreAttention, oracle: Oracle, draws: int = 8) -> dict[str, list[float]]:
    """Errors of output and gradients against float64, the mean of some draws: the core's, and the oracle's own.

    A loss of a few rows has a gradient whose rounding errors differ much between draws.
    """
    found = [parity_of_draw(core, oracle) for _ in range(draws)]
    means = {name: [mean(of) for of in zip(*(one[name] for one in found), strict=True)] for name in ("found", "torch")}
    return found[0] | means


def parity_of_draw(core: CausalCoreAttention, oracle: Oracle) -> dict[str, list[float]]:
    """Errors of output, gradients of inputs, and gradient of all own weights together; in float32, against float64."""
    inputs, dout = random_inputs(core), torch.randn(LENGTH, BATCH, core.shape.num_heads, core.shape.head_dim)

    def by_oracle(dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
        weights = {w.name: getattr(core, w.name).detach().to(dtype).requires_grad_() for w in core.own_weights}
        out = oracle.attend(core, weights, q, k, v)
        losses = oracle.losses(core, weights, q, k, v)
        columns = core.layer_layout.kind.columns()
        ((out * dout.to(dtype)).sum() + sum(columns[name] * loss for name, loss in losses.items())).backward()
        return [out, q.grad, k.grad, v.grad, *together(weights.values())]

    q, k, v = (x.clone().requires_grad_() for x in inputs)
    core.zero_grad()
    out = core(q, k, v, None)
    out.backward(dout.flatten(2))
    found = [out.view_as(dout), q.grad, k.grad, v.grad, *together(getattr(core, w.name) for w in core.own_weights)]
    exact, single = by_oracle(torch.float64), by_oracle(torch.float32)
    recorded = {name: float(total / count) for name, (total, count) in core.records.take().items()}
    double = {w.name: getattr(core, w.name).detach().double() for w in core.own_weights}
    losses = oracle.losses(core, double, *(x.double() for x in inputs))
    return {
        "found": [relative_error(*pair) for pair in zip(found, exact, strict=True)],
        "torch": [relative_error(*pair) for pair in zip(single, exact, strict=True)],
        "recorded": [recorded[name] for name in losses],
        "losses": [float(loss) for loss in losses.values()],
    }


def documents(core: CausalCoreAttention, oracle: Oracle, draws: int = 8) -> dict[str, list[float]]:
    """Errors of output and gradients of inputs within packed documents, as `parity`; the oracle takes each alone."""
    drawn = [documents_of_draw(core, oracle) for _ in range(draws)]
    return {name: [mean(of) for of in zip(*(one[name] for one in drawn), strict=True)] for name in ("found", "torch")}


def documents_of_draw(core: CausalCoreAttention, oracle: Oracle) -> dict[str, list[float]]:
    inputs, dout = random_inputs(core), torch.randn(LENGTH, BATCH, core.shape.num_heads, core.shape.head_dim)
    inside = torch.randint(LENGTH + 1, (BATCH, 4)).sort(1).values
    inside[:, 1] = inside[:, 0]  # an empty document
    bounds = torch.nn.functional.pad(inside, (1, 0)).to(torch.int32)
    bounds = torch.nn.functional.pad(bounds, (0, 1), value=LENGTH)

    def by_oracle(dtype: torch.dtype) -> list[Tensor]:
        q, k, v = leaves = [x.to(dtype).requires_grad_() for x in inputs]
        weights = {w.name: getattr(core, w.name).detach().to(dtype) for w in core.own_weights}
        of_sequences = []
        for sequence, ends in enumerate(bounds.tolist()):
            own = [
                tuple(x[first:end, sequence, None] for x in (q, k, v)) for first, end in pairwise(ends) if end > first
            ]
            of_sequences.append(torch.cat([oracle.attend(core, weights, *document) for document in own]))
        out = torch.cat(of_sequences, 1)
        return [out, *torch.autograd.grad(out, leaves, dout.to(dtype))]

    leaves = [x.clone().requires_grad_() for x in inputs]
    out = core(*leaves, None, packed_seq_params=packed_documents(bounds, LENGTH)).view_as(dout)
    found = [out, *torch.autograd.grad(out, leaves, dout)]
    exact, single = by_oracle(torch.float64), by_oracle(torch.float32)
    return {
        "found": [relative_error(*pair) for pair in zip(found, exact, strict=True)],
        "torch": [relative_error(*pair) for pair in zip(single, exact, strict=True)],
    }


@torch.no_grad()
def future(gpt: GPTModel) -> dict[str, list[bool]]:
    """Whether what comes before a changed token stays bit-identical, and whether what follows changes."""
    core, kept, changed = cores_of(gpt)[0], [], []
    for _ in range(6):
        inputs = random_inputs(core)
        at = int(torch.randint(1, LENGTH, ()))
        others = [torch.cat([x[:at], torch.randn_like(x[at : at + 1]), x[at + 1 :]]) for x in inputs]
        before, after = core(*inputs, None), core(*others, None)
        kept.append(torch.equal(before[:at], after[:at]))
        changed.append(not torch.equal(before[at], after[at]))
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))
        other = tokens.clone()
        other[:, at] = (other[:, at] + 1) % VOCABULARY
        before, after = logits_of(gpt, tokens), logits_of(gpt, other)
        kept.append(torch.equal(before[:, :at], after[:, :at]))
        changed.append(not torch.equal(before[:, at], after[:, at]))
    return {"kept": kept, "changed": changed}


@torch.no_grad()
def counts(gpt: GPTModel, cfg: PretrainConfig, oracle: Oracle) -> dict[str, Any]:
    """Parameters, kept positions and FLOPs: of the built model, and of the plan."""
    hybrid, core = hybrid_layout(cfg), cores_of(gpt)[0]
    layer, shape = hybrid.layers[0], attention_shape(cfg.model)
    draws = 1 if layer.kind.counts_exactly else 200
    kept = torch.zeros(shape.num_heads, dtype=torch.float64)
    for draw in range(draws):
        core.step = draw
        query, key, _ = random_inputs(core)
        kept += (oracle.weights(core, query, key) > 0).double().sum((2, 3)).mean(0) / draws
    core.step = 0
    planned = kept_positions(layer, LENGTH)
    of_layers = 3 * 2 * (4 * shape.head_dim * sum(planned) + layer.kind.extra_flops(layer, LENGTH, shape))
    found = {
        "parameters": [sum(p.numel() for p in gpt.parameters()), total_parameters(cfg.model, hybrid.layers)],
        "kept": [kept.tolist(), list(planned)],
        "exact": layer.kind.counts_exactly,
        "attention_flops": [of_layers / LENGTH, token_flops(cfg.model, hybrid, LENGTH).attention],
        "own": bool(layer.kind.weights(shape)) or oracle.counted_products is not None,
        "extra": [0, layer.kind.extra_flops(layer, LENGTH, shape)],
    }
    if oracle.counted_products is not None:
        q, k, v = random_inputs(core)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch 2.15 counts it, 2.13 doesn't
        with FlopCounterMode(display=False, custom_mapping={fused: lambda *_, **__: 0}) as counter, torch.enable_grad():
            core(q[:, :1], k[:, :1], v[:, :1], None)
        found["extra"][0] = counter.get_total_flops() - oracle.counted_products(core, LENGTH)
    return found


def recomputation(cfg: PretrainConfig) -> dict[str, Any]:
    """Whether losses, gradients and recorded values are those of a run without, bit for bit."""
    tokens, results = torch.randint(VOCABULARY, (BATCH, LENGTH)), []
    for recompute in ("none", "selective", "mlp", "full"):
        gpt = build(replace(cfg, train=replace(cfg.train, recompute=recompute)))
        gpt.train()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in gpt.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        positions = torch.arange(LENGTH).expand(BATCH, LENGTH).contiguous()
        losses = gpt(tokens, positions, None, labels=tokens)
        losses.sum().backward()
        recorded = [core.records.take() for core in cores_of(gpt)]
        values = [[name, float(total), count] for one in recorded for name, (total, count) in sorted(one.items())]
        results.append(([losses, *(p.grad for p in gpt.parameters())], values))
    first, *others = results
    return {
        "equal": [all(map(torch.equal, first[0], found)) for found, _ in others],
        "records": [values == first[1] for _, values in others],
        "missing": sum(grad is None for grad in first[0]),
        "per_layer": [count for _, _, count in first[1]],
    }


@torch.no_grad()
def decoding(gpt: GPTModel, cfg: PretrainConfig, layers: str | None = None) -> dict[str, Any]:
    """Logits token by token against the uncached forward pass, sequences of unequal length; or the rejection.

    The uncached model has the same weights, and these layers if given.
    """
    gpt.eval()
    gpt.parallel_output = False
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))
    lengths, total = torch.tensor([BLOCK + 3, 2 * BLOCK]), 20
    try:
        with kv_cache(gpt, BATCH, LENGTH) as cache:
            model = CachedModel(gpt, cache)
            found = [model.prefill(tokens[:, : 2 * BLOCK], lengths, BLOCK)]
            following = [torch.stack([tokens[i, n + step] for i, n in enumerate(lengths)]) for step in range(total)]
            found += [model.decode(token) for token in following]
    except ConfigError as error:
        return {"rejected": str(error)}
    if layers is not None:
        uncached = build(replace(cfg, layout=replace(cfg.layout, layers=layers)))
        uncached.load_state_dict(gpt.state_dict())
        gpt = uncached.eval()
    whole = logits_of(gpt, tokens)
    rows = [torch.stack([whole[i, n - 1 + step] for i, n in enumerate(lengths)]) for step in range(total + 1)]
    return {"error": relative_error(torch.stack(found), torch.stack(rows).double())}


def main() -> None:
    register(ToyKind)
    initialize(ParallelConfig(), 1)
    torch.seed()
    results = {}
    for name, oracle in ORACLES.items():
        cfg = config_of(oracle)
        gpt = build(cfg)
        core = cores_of(gpt)[0]
        core.step = 3
        with torch.no_grad():
            for parameter in core.parameters():  # no weight is 0, and no gradient
                parameter.add_(torch.randn_like(parameter) * 0.1)
        kind = core.layer_layout.kind
        results[name] = {
            "parity": parity(core, oracle),
            "future": future(gpt),
            "counts": counts(gpt, cfg, oracle),
            "decoding": decoding(gpt, cfg, oracle.decodes_as),
            "documents": documents(core, oracle) if Feature.PACKED_DOCUMENTS in kind.features else None,
            "recomputation": recomputation(cfg) if Feature.RECOMPUTATION in kind.features else None,
        }
    register(ShyKind)
    cfg = config_of(replace(ORACLES["toy"], kinds={"T": {"kind": "shy"}}))
    results["shy"] = {"decoding": decoding(build(cfg), cfg)}
    shutdown()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
