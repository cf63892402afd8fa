"""Decodes small random models with and without a cache, and prints measurements as JSON.

Runs in a separate process, since Megatron's groups and its CPU mode are global. Under torchrun it is tensor parallel.
"""

import gc
import json
import os
import sys
import weakref
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from s2train.kernels.relative_error import relative_error
from torch import Tensor

from s2train.attention.hybrid import HybridLayout
from s2train.config import ModelConfig, ParallelConfig, PretrainConfig, TrainConfig
from s2train.errors import ConfigError
from s2train.inference.cached_model import CachedModel
from s2train.inference.generation import generate
from s2train.inference.kv_cache import KVCache, kv_cache
from s2train.inference.sampling import Sampler
from s2train.layouts.patterns.registry import PATTERNS
from s2train.megatron.block_attention import DenseCoreAttention
from s2train.megatron.core_attention import cores_of
from s2train.megatron.layer_backends import choose_backend
from s2train.megatron.model import build_model, transformer_config, unwrap
from s2train.megatron.setup import initialize, shutdown
from tests.inference.cached_models import (
    BLOCK,
    DIVIDED,
    HALF_TURNED,
    MODELS,
    NUM_BLOCKS,
    VOCABULARY,
    hybrid_of,
    registered,
)
from tests.inference.uncached import greedy_decode


def build(
    model_or_layout: str | HybridLayout, device: torch.device, tp: int = 1, backend: str = "auto"
) -> tuple[GPTModel, HybridLayout]:
    """Build a random model: one of MODELS by name, or with a given layout of heads."""
    hybrid = hybrid_of(model_or_layout) if isinstance(model_or_layout, str) else model_or_layout
    groups = hybrid.num_query_groups
    model = ModelConfig("test", len(hybrid.layers), 64, 96, 4, groups, 16, VOCABULARY, init_std=0.2)
    if model_or_layout in HALF_TURNED:
        model.rotary_percent, model.qk_norm = 0.5, True
    train = TrainConfig(steps=1, seq_length=hybrid.block_size * NUM_BLOCKS, global_batch_size=1, precision="fp32")
    cfg = PretrainConfig(model=model, parallel=ParallelConfig(tp=tp), train=train, attention_backend=backend)
    (chunk,) = build_model(cfg, transformer_config(cfg), hybrid, choose_backend("local"), device)
    gpt = unwrap(chunk)
    gpt.parallel_output = False
    gpt.output_layer.gather_output = True
    return gpt.eval(), hybrid


def positions_like(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens).contiguous()


def brute_force_pages(cache: KVCache, hybrid: HybridLayout, length: int) -> int:
    """Count pages of a sequence from the patterns' definition."""
    query, key = torch.arange(cache.num_blocks)[:, None], torch.arange(cache.num_blocks)[None]
    count = 0
    for layer in hybrid.layers:
        kept = torch.stack([head.keep(query, key) & (query >= key) for head in layer.heads])
        grouped = kept.view(hybrid.num_query_groups, -1, *kept.shape[1:]).any(1)
        needed = grouped[:, length // layer.block_size :].any(1)
        count += int(needed[:, : layer.num_blocks(length)].sum())
    return count


@torch.no_grad()
def compare(
    model_or_layout: str | HybridLayout,
    device: torch.device,
    prompt: int,
    chunk: int,
    total: int,
    tp: int = 1,
    backend: str = "auto",
    sequences: int = 2,
) -> dict[str, Any]:
    """Measure errors of all logits after the prompt against float64, and pages in use after each token."""
    gpt, hybrid = build(model_or_layout, device, tp, backend)
    tokens = torch.randint(0, VOCABULARY, (sequences, total), device=device)
    position_ids = positions_like(tokens)
    plain = gpt(tokens, position_ids, None)[:, prompt - 1 :]
    held, brute, predicted, stored = [], [], [], []
    with kv_cache(gpt, sequences, total) as cache:
        model = CachedModel(gpt, cache)
        found = [model.prefill(tokens[:, :prompt], chunk=chunk)]
        for at in range(prompt, total + 1):
            held.append(cache.pool.used)
            predicted.append(cache.predicted_bytes() // cache.pool.page_bytes)
            stored.append([int((cache.table >= 0).sum()), int((cache.pages >= 0).sum())])
            brute.append(sequences * brute_force_pages(cache, hybrid, at))
            if at < total:
                found.append(model.decode(tokens[:, at]))
    cached = torch.stack(found, 1)
    for core in cores_of(gpt):
        core.backend = "torch"  # which supports float64
    exact = gpt.double()(tokens, position_ids, None)[:, prompt - 1 :]
    return {
        "error": float((cached.double() - exact).norm()),
        "plain_error": float((plain.double() - exact).norm()),
        "scale": float(exact.norm()),
        "held": held,
        "predicted": predicted,
        "brute": brute,
        "stored": stored,
        "dense": sequences * len(hybrid.layers) * hybrid.num_query_groups * -(-total // hybrid.block_size),
    }


def saved_by_attention(device: torch.device, tp: int) -> dict[str, int]:
    """Elements of the largest tensor that self attention keeps for the backward pass, if ranks share one KV head."""
    gpt, _ = build("mqa", device, tp)
    attention, saved = gpt.decoder.layers[0].self_attention, [0]

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    attention.register_forward_pre_hook(lambda *_: hooks.__enter__())
    attention.register_forward_hook(lambda *_: hooks.__exit__())
    tokens = torch.zeros(2, 4 * BLOCK, dtype=torch.int64, device=device)
    gpt(tokens, positions_like(tokens), None)
    return {"largest": max(saved), "stream": tokens.numel() * 64, "all_heads": tokens.numel() * (4 + 2) * 16}


def unequal_prompts(device: torch.device) -> dict[str, Any]:
    """Decode sequences in a batch and alone, in float64, so that rounding changes no token."""
    gpt = build("hybrid", device)[0].double()
    lengths = [BLOCK - 1, 3 * BLOCK, 1, 2 * BLOCK + 5]
    prompts = torch.randint(0, VOCABULARY, (4, 3 * BLOCK), device=device)
    together = generate(gpt, prompts, 20, lengths=torch.tensor(lengths), prefill_chunk=BLOCK)
    alone = [greedy_decode(gpt, prompts[i : i + 1, :n], 20) for i, n in enumerate(lengths)]
    return {"together": together.tolist(), "alone": torch.cat(alone).tolist()}


def unequal_pages(device: torch.device) -> dict[str, Any]:
    """Count pages of sequences of unequal lengths after each step, and by definition."""
    gpt, hybrid = build("scattered", device)
    lengths, held, brute = [5, 2 * BLOCK + 1, 3 * BLOCK], [], []
    with kv_cache(gpt, 3, 5 * BLOCK) as cache:
        model = CachedModel(gpt, cache)
        token = model.prefill(torch.zeros(3, 3 * BLOCK, dtype=torch.int64), torch.tensor(lengths), BLOCK).argmax(-1)
        for step in range(2 * BLOCK):
            held.append(cache.pool.used)
            brute.append(sum(brute_force_pages(cache, hybrid, n + step) for n in lengths))
            token = model.decode(token).argmax(-1)
    return {"held": held, "brute": brute}


@torch.no_grad()
def losses(name: str, device: torch.device, tp: int = 1) -> dict[str, Any]:
    """Measure errors of the losses of unequal sequences against float64, and agreement on the likeliest tokens."""
    gpt, _ = build(name, device, tp)
    lengths, total = [2 * BLOCK + 3, 5 * BLOCK, 2], 5 * BLOCK
    tokens = torch.randint(0, VOCABULARY, (3, total), device=device)
    targets = torch.randint(0, VOCABULARY, (3, total), device=device)
    known = torch.arange(total)[None] < torch.tensor(lengths)[:, None]
    with kv_cache(gpt, 3, total) as cache:
        found, likeliest = CachedModel(gpt, cache).losses(tokens, targets, torch.tensor(lengths), chunk=2 * BLOCK)
        agrees = cache.bytes_in_use == cache.predicted_bytes()
    plain = gpt(tokens, positions_like(tokens), None)
    for core in cores_of(gpt):
        core.backend = "torch"
    exact = gpt.double()(tokens, positions_like(tokens), None)
    entropy = [torch.nn.functional.cross_entropy(x.transpose(1, 2), targets, reduction="none") for x in (plain, exact)]
    return {
        "error": float((found.double() - entropy[1])[known].norm()),
        "plain_error": float((entropy[0].double() - entropy[1])[known].norm()),
        "scale": float(entropy[1][known].norm()),
        "likeliest": float((likeliest == (plain.argmax(-1) == targets))[known].double().mean()),
        "agrees": agrees,
    }


def sampled(device: torch.device) -> dict[str, Any]:
    """Sample sequences in a batch and alone, in float64, so that rounding changes no token."""
    gpt = build("hybrid", device)[0].double()
    prompts = torch.randint(0, VOCABULARY, (3, 2 * BLOCK + 1), device=device)

    def sample(numbers: list[int], seed: int = 7) -> list[list[int]]:
        choose = Sampler(seed, numbers, temperature=1.0, top_k=50, top_p=0.95)
        return generate(gpt, prompts[numbers], 12, choose=choose).tolist()

    return {
        "together": sample([0, 1, 2]),
        "alone": [sample([number])[0] for number in range(3)],
        "again": sample([0, 1, 2], seed=8),
        "greedy": generate(gpt, prompts, 12).tolist(),
    }


def end_of_document(device: torch.device) -> dict[str, Any]:
    """Decode sequences that end at a token they generate, and are filled with it."""
    gpt = build("sparse", device)[0].double()
    prompts = torch.randint(0, VOCABULARY, (3, 20), device=device)
    free = generate(gpt, prompts, 40)
    eod = int(free[0, 9])
    return {"eod": eod, "free": free.tolist(), "ended": generate(gpt, prompts, 40, eod=eod).tolist()}


def finished_sequences(device: torch.device) -> dict[str, Any]:
    """Finish one sequence; count its pages, and continue the other."""
    gpt, _ = build("hybrid", device)
    tokens = torch.randint(0, VOCABULARY, (2, 60), device=device)
    runs = []
    for finish in (False, True):
        with kv_cache(gpt, 2, 60) as cache:
            model = CachedModel(gpt, cache)
            model.prefill(tokens[:, :30])
            before = cache.pool.used
            if finish:
                cache.finish(0)
            after = cache.pool.used
            logits = torch.stack([model.decode(tokens[:, at])[1] for at in range(30, 60)])
            runs.append((logits, before, after, cache.bytes_in_use == cache.predicted_bytes()))
    (plain, *_), (found, before, after, agrees) = runs
    return {"same": torch.equal(plain, found), "before": before, "after": after, "agrees": agrees}


def rejections(device: torch.device) -> dict[str, Any]:
    gpt, _ = build("dense", device)
    tokens = torch.randint(0, VOCABULARY, (1, 3 * BLOCK), device=device)

    def message_of(action: Any, kind: type[Exception]) -> str:
        try:
            action()
        except kind as error:
            return str(error)
        return "nothing"

    def full() -> None:
        with kv_cache(gpt, 1, BLOCK) as cache:
            model = CachedModel(gpt, cache)
            model.prefill(tokens[:, :BLOCK])
            model.decode(tokens[:, 0])

    def nested() -> None:
        with kv_cache(gpt, 1, BLOCK), kv_cache(gpt, 1, BLOCK):
            pass

    def sequence_parallel() -> None:
        gpt.config.sequence_parallel = True
        try:
            generate(gpt, tokens, 1)
        finally:
            gpt.config.sequence_parallel = False

    def training() -> None:
        gpt.train()
        generate(gpt, tokens, 1)

    def unknown_token() -> None:
        generate(gpt, tokens.clamp(min=gpt.vocab_size), 1)

    def one_dimension() -> None:
        generate(gpt, tokens[0], 1)

    answers = {"full": message_of(full, ValueError)}
    answers |= {"token": message_of(unknown_token, ValueError), "flat": message_of(one_dimension, ValueError)}
    answers |= {"nested": message_of(nested, ValueError), "parallel": message_of(sequence_parallel, ValueError)}
    answers["training"] = message_of(training, ValueError)
    attached = [core.kv for core in cores_of(gpt)]
    return answers | {"attached": sum(kv is not None for kv in attached)}


def forgotten(device: torch.device) -> dict[str, Any]:
    """Check that leaving the context frees the pool's memory and restores the model."""
    gpt, _ = build("hybrid", device)
    tokens = torch.randint(0, VOCABULARY, (2, 40), device=device)
    before = gpt(tokens, positions_like(tokens), None)
    gc.disable()  # the memory must be freed without a collection
    with kv_cache(gpt, 2, 40) as cache:
        CachedModel(gpt, cache).prefill(tokens[:, :30])
        pool = weakref.ref(cache.pool.keys)
    del cache
    gc.enable()
    after = gpt(tokens, positions_like(tokens), None)
    return {"gone": pool() is None, "same": torch.equal(before, after)}


@torch.no_grad()
def later_queries(device: torch.device) -> dict[str, Any]:
    """Compute a dense layer's chunk by torch, and by the sparse op as on Hopper."""
    gpt, _ = build("hybrid", device)
    (core, *_) = (m for m in gpt.modules() if isinstance(m, DenseCoreAttention))
    s_k, s_q = 3 * BLOCK + 5, BLOCK + 3
    q, k, v = (torch.randn(s, 2, h, 16, device=device) for s, h in ((s_q, 4), *2 * [(s_k, core.num_kv_heads)]))
    outs = [core.attend(q, k, v, s_k - s_q)]
    core.implementation = "s2train"
    outs.append(core.attend(q, k, v, s_k - s_q))
    return {"difference": relative_error(outs[1], outs[0])}


def longer_than_masks(device: torch.device) -> str:
    """Error message for a cache with more blocks than a file's masks."""
    gpt, _ = build(registered("file"), device)
    try:
        with kv_cache(gpt, 1, BLOCK * NUM_BLOCKS + 1):
            return "nothing"
    except ConfigError as error:
        return str(error)


def measure_registered(device: torch.device) -> dict[str, Any]:
    """Measure every registered pattern, a layout schedule that continues across layers, and blocks of 64."""
    results: dict[str, Any] = {"longer than masks": longer_than_masks(device)}
    layouts = {kind: registered(kind) for kind in PATTERNS} | {"rotating": registered("local_vertical", "rotating")}
    for name, layout in layouts.items():
        results[name] = compare(layout, device, 3 * BLOCK + 5, BLOCK, BLOCK * NUM_BLOCKS)
    for prompt in (127, 128, 129):
        results[f"64 {prompt}"] = compare(hybrid_of("hybrid", 64), device, prompt, 64, 2 * 64 + 12, sequences=4)
    return results


def measure_triton(device: torch.device, tp: int) -> dict[str, Any]:
    """Measure the interpreted kernels in few steps, since one takes half a second."""
    if tp > 1:
        return {"tp": compare("different heads in a group", device, 2 * BLOCK - 1, BLOCK, 2 * BLOCK + 2, tp, "triton")}
    names = ("hybrid", "different heads in a group")
    return {name: compare(name, device, 2 * BLOCK - 1, BLOCK, 2 * BLOCK + 2, backend="triton") for name in names}


@torch.no_grad()
def on_cuda(name: str, device: torch.device) -> dict[str, Any]:
    """Compare eager steps and steps replayed from a CUDA graph with the uncached forward."""
    gpt, _ = build(name, device)
    total, prompt = BLOCK * NUM_BLOCKS, 2 * BLOCK + 3
    tokens = torch.randint(0, VOCABULARY, (3, total), device=device)
    found = []
    for cuda_graph in (False, True):
        with kv_cache(gpt, 3, total) as cache:
            model = CachedModel(gpt, cache, cuda_graph)
            logits = [model.prefill(tokens[:, :prompt], chunk=BLOCK)]
            logits += [model.decode(tokens[:, at]) for at in range(prompt, total)]
            agrees = cache.bytes_in_use == cache.predicted_bytes()
        found.append(torch.stack(logits, 1))
    plain = gpt(tokens, positions_like(tokens), None)[:, prompt - 1 :]
    return {
        "replayed_as_run": torch.equal(*found),
        "difference": relative_error(found[0], plain),
        "agrees": agrees,
    }


def main() -> None:
    tp = int(os.environ.get("WORLD_SIZE", "1"))
    device = initialize(ParallelConfig(tp=tp), seed=int(sys.argv[1]))
    if sys.argv[2:] == ["cuda"]:
        results = {name: on_cuda(name, device) for name in MODELS}
    elif sys.argv[2:] == ["triton"]:
        results = measure_triton(device, tp)
    elif sys.argv[2:] == ["registered"]:
        results = measure_registered(device)
    else:
        results = measure_models(device, tp)
    if torch.distributed.get_rank() == 0:
        print(json.dumps(results))
    shutdown()


def measure_models(device: torch.device, tp: int) -> dict[str, Any]:
    """Measure all of MODELS, and on one rank everything else."""
    results: dict[str, Any] = {}
    longest, prompt = BLOCK * NUM_BLOCKS, (3 if tp == 1 else 4) * BLOCK + 5
    for name in MODELS if tp == 1 else DIVIDED:
        results[name] = compare(name, device, prompt, longest, longest, tp)
        results[f"{name} in chunks"] = compare(name, device, prompt + BLOCK - 2, BLOCK, longest, tp)
        results[f"losses {name}"] = losses(name, device, tp)
    if tp > 1:
        results["saved"] = saved_by_attention(device, tp)
    if tp == 1:
        for prompt in (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 5 * BLOCK + 3):
            total = prompt + (1 if prompt in (1, BLOCK) else BLOCK + 2)
            # with two sequences, rounding of a single token's logits may change the result
            results[f"hybrid {prompt}"] = compare("hybrid", device, prompt, 2 * BLOCK, total, sequences=4)
        for scenario in (
            unequal_prompts,
            unequal_pages,
            end_of_document,
            sampled,
            finished_sequences,
            rejections,
            forgotten,
            later_queries,
        ):
            results[scenario.__name__] = scenario(device)
    return results


if __name__ == "__main__":
    main()
