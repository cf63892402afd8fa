"""Measures the core attention of block selection on one process; prints JSON."""

import json
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from s2train.kernels.relative_error import largest, relative_error
from s2train.kernels.select_blocks import reference_select_blocks
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from s2train.attention.block_selection import QUERIES, SCORERS
from s2train.attention.selection import lists
from s2train.config import ParallelConfig
from s2train.inference.cached_model import CachedModel
from s2train.inference.kv_cache import kv_cache
from s2train.megatron import block_selection, selection_losses
from s2train.megatron.block_selection import BlockSelectionCoreAttention
from s2train.megatron.core_attention import cores_of
from s2train.megatron.selection_cache import cached_list
from s2train.megatron.setup import initialize, shutdown
from tests.attention import block_selection_oracle as oracle
from tests.attention.conformance_program import BATCH, BLOCK, LENGTH, VOCABULARY, build, config_of, logits_of
from tests.attention.oracles import Oracle

Passed = tuple[Tensor, dict[str, Tensor], dict[str, float]]


def make(**settings: Any) -> tuple[Any, Any, BlockSelectionCoreAttention]:
    """Configuration, model and first core attention; every weight of the kind is random."""
    kinds = {"B": {"kind": "block_selection", "sinks": 0} | settings}
    if "share" not in settings:
        kinds["B"]["top_k"] = settings.get("top_k", 1)
    cfg = config_of(Oracle("block_selection", "B", oracle.read, kinds))
    gpt = build(cfg)
    for core in cores_of(gpt):
        with torch.no_grad():
            for weight in core.parameters():
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    return cfg, gpt, cores_of(gpt)[0]


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(LENGTH, BATCH, count, 8, generator=generator) for count in (4, 2, 2)]


def passed(core: BlockSelectionCoreAttention, step: int = 1, is_logged: bool = True) -> Passed:
    """Output, gradients by name, and recorded values of one training pass."""
    core.step, core.is_logged = step, is_logged
    core.zero_grad()
    leaves = {name: x.requires_grad_() for name, x in zip("qkv", inputs(), strict=True)}
    out = core(*leaves.values(), None)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    grads = {name: x.grad for name, x in (leaves | dict(core.named_parameters())).items()}
    recorded = {name: float(total / count) for name, (total, count) in core.records.take().items()}
    return out, grads, recorded  # type: ignore[return-value]


def pooled_oracle(core: BlockSelectionCoreAttention) -> dict[str, float]:
    """The losses and the recall of a dense step by definition, in float64: of whole query blocks."""
    query, key, _ = (x.double() for x in inputs())
    weights = {weight.name: getattr(core, weight.name).detach().double() for weight in core.own_weights}
    position = torch.arange(LENGTH)
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key.repeat_interleave(2, 2)) * core.softmax_scale
    rows = scores.masked_fill(position > position[:, None], -torch.inf).softmax(-1).unflatten(1, (2, 2)).mean(2)
    read = oracle.read(core, query, key)[:, ::2]
    total = {"kl": 0.0, "mse": 0.0, "recall": float((rows * read).sum(-1).mean())}
    for sequence in range(BATCH):
        found = oracle.scores(core, weights, query[:, sequence], key[:, sequence])
        for block in range(-(-LENGTH // BLOCK)):
            chosen = oracle.candidates(core, block)
            of_block = rows[sequence, :, block * BLOCK : (block + 1) * BLOCK]
            share = of_block.shape[1] / LENGTH / BATCH / 2
            for g in range(2) if chosen else ():
                mass = torch.stack([of_block[g, :, c * BLOCK : (c + 1) * BLOCK].sum(-1).mean() for c in chosen])
                estimate = found[g, block, chosen].softmax(-1)
                total["kl"] += share * float((mass * (mass / mass.sum() / estimate).log()).sum())
                total["mse"] += share * float((estimate * mass.sum() - mass).square().sum())
    return total


def dense_out() -> Tensor:
    query, key, value = (x.permute(1, 2, 0, 3) for x in inputs())
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.permute(2, 0, 1, 3).flatten(2)


def warm_up() -> dict[str, Any]:
    core = make(scorer="sea", features=8, channels=4, warm_up_steps=2)[2]
    during, _, recorded = passed(core, step=2)
    after, outside = passed(core, step=3)[0], passed(core, step=0)[0]
    evaluated = passed(core.eval(), step=2)[0]
    core.train()
    return {
        "during": relative_error(during, dense_out()),
        "evaluated": float((evaluated - after).abs().max()),
        "after": relative_error(after, dense_out()),
        "outside": float((outside - after).abs().max()),
        "recorded": recorded,
        "oracle": pooled_oracle(core),
    }


SIZES = {"index": {"index_dim": 8}, "sea": {"features": 8, "channels": 4}}
NO_LOSS = {"index": {"loss_weight": 0}, "sea": {"loss_weight": 0, "mse_weight": 0}}


def gradients() -> dict[str, Any]:
    """By scorer and phase: gradients of weights with the losses and without, and whether those of q, k, v differ."""
    found = {}
    for scorer, sizes in SIZES.items():
        for warm_up_steps in (0, 1):

            def of(**settings: Any) -> Passed:
                return passed(make(scorer=scorer, warm_up_steps=warm_up_steps, **sizes, **settings)[2])  # noqa: B023

            (_, alone, _), (_, learning, _) = of(**NO_LOSS[scorer]), of(loss_weight=2)
            trunk = of(loss_weight=2, trunk_gradient=True)[1]
            weights = [name for name in alone if name not in "qkv"]
            found[f"{scorer}, {'warm-up' if warm_up_steps else 'selected'}"] = {
                "without the loss": [float(alone[name].abs().max()) for name in weights],
                "with the loss": [float(learning[name].abs().max()) for name in weights],
                "trunk": [torch.equal(alone[name], learning[name]) for name in "qkv"],
                "trunk asked": [torch.equal(alone[name], trunk[name]) for name in "qkv"],
            }
    return found


def changed_before() -> dict[str, int]:
    """By scorer, query source and phase: positions of a block whose change alters an output before them."""
    found = {}
    for scorer in SCORERS:
        for queries in QUERIES:
            core = make(scorer=scorer, queries=queries, mix_mean=True, warm_up_steps=1, **SIZES.get(scorer, {}))[2]
            before, block = inputs(), int(torch.randint(3, LENGTH // BLOCK, ()))
            for core.step, phase in ((1, "warm-up"), (2, "selected")):
                out, altered = core(*before, None), 0
                for position in range(block * BLOCK, (block + 1) * BLOCK):
                    later = [torch.cat([x[:position], torch.randn_like(x[position:]) * 3]) for x in before]
                    altered += not torch.equal(core(*later, None)[:position], out[:position])
                found[f"{scorer}, {queries}, {phase}"] = altered
    return found


def compiled() -> list[bool]:
    """Whether running a layer's kernels before the model exists went through forward and backward."""
    _, _, core = make(scorer="index", warm_up_steps=1)
    found = []
    for offset in (0, 2 * BLOCK):  # the latter as a later chunk of a context parallel rank
        query, key, value = inputs()
        leaves = [torch.zeros_like(x).requires_grad_() for x in (query[offset:], key, value)]
        type(core).compile_kernels(core.layer_layout, *leaves, offset, "auto")
        found += [x.grad is not None and bool(x.grad.isfinite().all()) for x in leaves]
    return found


def short() -> list[float]:
    """Difference from dense attention of sequences that window and sinks cover, with a partial block and without."""
    _, _, core = make(scorer="sea", features=8, channels=4)
    errors = []
    for length in (1, BLOCK - 3, BLOCK, 2 * BLOCK - 1):
        query, key, value = (x[:length] for x in inputs())
        errors.append(relative_error(core(query, key, value, None), dense_out()[:length]))
    return errors


def recall_of_all() -> list[float]:
    return [passed(make(scorer=name, share=1.0)[2], step=3)[2]["recall"] for name in ("moba", "index")]


def unlogged() -> dict[str, Any]:
    """What a step records that the run doesn't log, and whether its bits are those of a logged step."""
    found = {}
    for name in ("moba", "index"):
        for warm_up_steps in (0, 3):
            _, _, core = make(scorer=name, warm_up_steps=warm_up_steps)
            out, grads, recorded = passed(core, 3, is_logged=False)
            logged_out, logged_grads, _ = passed(core, 3)
            same = [torch.equal(grads[one], logged_grads[one]) for one in grads]
            case = f"{name}, {'warm-up' if warm_up_steps else 'selected'}"
            found[case] = {"recorded": sorted(recorded), "same": [torch.equal(out, logged_out), *same]}
    return found


def scorings() -> dict[str, list[int]]:
    """How often a warm-up's step scores: logged, and not logged."""
    found = {}
    for name in ("moba", "index", "sea"):
        core = make(scorer=name, warm_up_steps=3)[2]
        scorer = type(core.kind.scorer)
        found[name] = []
        for is_logged in (True, False):
            original = scorer.head_scores
            with mock.patch.object(scorer, "head_scores", autospec=True, side_effect=original) as counted:
                passed(core, 3, is_logged)
            found[name].append(counted.call_count)
    return found


class Waits(TorchDispatchMode):
    """Notes the operators that let the host wait for a device: copies between the two.

    Reading a number of a meta tensor raises an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
        if len(devices) > 1:
            self.found.append(str(func))
        return out


class Assignments(TorchFunctionMode):
    """Notes numbers written to elements: on a GPU each is copied from the host, which waits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__setitem__ and not isinstance(args[2], Tensor):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def waits() -> dict[str, list[str]]:
    """What the host would wait for around the kernels, in a step of bfloat16 tensors of another device."""

    def attend(query: Tensor, *_: Any, return_lse: bool = False, **__: Any) -> Any:
        lse = query.new_empty(*query.permute(1, 2, 0, 3).shape[:3], dtype=torch.float32)
        return (query * 1, lse) if return_lse else query * 1

    def mass(query: Tensor, key: Tensor, *_: Any, block_size: int, **__: Any) -> Tensor:
        count = -(-len(query) // block_size)
        return key.new_empty(key.shape[1], key.shape[2], count, count, dtype=torch.float32)

    def positions(length: int, count: int, seed: int, device: torch.device) -> Tensor:
        return torch.empty(count, dtype=torch.int64, device=device)  # there is no random generator

    def selected(scores: Tensor, rows: Tensor, counts: Tensor, *, backend: str, **options: Any) -> Tensor:
        return reference_select_blocks(scores, rows, counts, **options)

    found = {}
    stubs = {"block_mass": mass, "sampled_positions": positions}
    with (
        mock.patch.multiple(block_selection, kernels_in_use=mock.Mock(), block_sparse_attention=attend),
        mock.patch.multiple(selection_losses, **stubs),
        mock.patch.object(lists, "select_blocks", selected),
    ):
        for name in ("moba", "index", "sea"):
            core = make(scorer=name, warm_up_steps=1)[2].to("meta", torch.bfloat16)
            core.cache = SimpleNamespace(get=lambda *_: None)  # type: ignore[assignment]
            for phase, step in (("warm-up", 1), ("selected", 2)):
                core.step, core.is_logged = step, True
                leaves = [x.to("meta", torch.bfloat16).requires_grad_() for x in inputs()]
                with Assignments() as numbers, Waits() as copies:
                    out = core(*leaves, None)
                    out.backward(torch.empty_like(out))
                found[f"{name}, {phase}"] = numbers.found + copies.found
    return found


@torch.no_grad()
def in_chunks() -> dict[str, bool]:
    """Whether each scorer's lists in chunks of few query blocks are those of all at once."""
    found = {}
    for name in ("moba", "index", "sea"):
        core = make(scorer=name, sinks=1)[2].double()
        query, key, _ = (x.double() for x in inputs())
        block_queries, features = core.block_queries(query), core.features(key)
        whole = core.lists(block_queries, features, 0, features.shape[1])
        for rows in (1, 2, 3):
            with mock.patch.object(lists, "_CHUNK_ROWS", rows):
                found[f"{name}, {rows}"] = torch.equal(core.lists(block_queries, features, 0, features.shape[1]), whole)
                candidates = core.kind.budget.candidates(torch.arange(whole.shape[2])[None, None], features.shape[1])
                scores = core.kind.scorer.head_scores(block_queries, features, candidates, core.weight)
                found[f"{name}, {rows}, scored"] = torch.equal(
                    core.lists(block_queries, features, 0, features.shape[1], scores), whole
                )
    return found


@torch.no_grad()
def reads() -> dict[str, Any]:
    """Bytes that a decoding step reads: as the cache counts them, and of the pages that its lists name."""
    _, gpt, _ = make(scorer="moba", top_k=1)
    gpt.eval()
    gpt.parallel_output = False
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))
    with kv_cache(gpt, BATCH, LENGTH) as cache:
        model = CachedModel(gpt, cache)
        model.prefill(tokens[:, : 4 * BLOCK + 2], None, BLOCK)
        counted = cache.bytes_read()
        model.decode(tokens[:, -1])
        core = cores_of(gpt)[0]
        listed = int((cached_list(core, cache.layers[0]) >= 0).sum())  # type: ignore[arg-type]
        state = sum(x.nbytes for x in cache.layers[0].state.values())
        page, dense = cache.pool.page_bytes, cache.dense_bytes()
        return {"counted": counted, "pages": 2 * listed * page, "own": 2 * BATCH * 2 * page // 2, "state": 2 * state,
                "dense": dense}  # fmt: skip


@torch.no_grad()
def decoding(prompt: Tensor, steps: int, chunk: int, **settings: Any) -> dict[str, float]:
    """Largest error of a step's logits against the uncached pass, after prompts in chunks; by scorer."""
    found = {}
    for name in SCORERS:
        _, gpt, _ = make(scorer=name, **settings)
        gpt.eval()
        gpt.parallel_output = False
        tokens = torch.randint(VOCABULARY, (BATCH, int(prompt.max()) + steps))
        with kv_cache(gpt, BATCH, tokens.shape[1]) as cache:
            model = CachedModel(gpt, cache)
            logits = [model.prefill(tokens[:, : int(prompt.max())], prompt, chunk)]
            following = [tokens[range(BATCH), (prompt + step).tolist()] for step in range(steps)]
            logits += [model.decode(token) for token in following]
        whole = logits_of(gpt, tokens)
        expected = [whole[range(BATCH), (prompt - 1 + step).tolist()] for step in range(steps + 1)]
        found[name] = largest(map(relative_error, logits, expected))
    return found


def decoding_of_many_blocks() -> dict[str, float]:
    end = 40 * BLOCK  # the first sequence's new tokens begin a block
    return decoding(torch.tensor([end - 3, end - BLOCK - 9]), 4, 10 * BLOCK, share=0.125, sinks=1)


def decoding_of_new_blocks() -> dict[str, float]:
    """New tokens fill blocks that later ones select; the shorter prompt ends within a block of the longer one."""
    return decoding(torch.tensor([6 * BLOCK + 3, 5 * BLOCK + 9]), 5 * BLOCK, BLOCK, top_k=1)


def main() -> None:
    initialize(ParallelConfig(), 1)
    results = {
        "warm_up": warm_up(),
        "gradients": gradients(),
        "changed_before": changed_before(),
        "compiled": compiled(),
        "short": short(),
        "recall": recall_of_all(),
        "unlogged": unlogged(),
        "scorings": scorings(),
        "waits": waits(),
        "in_chunks": in_chunks(),
        "reads": reads(),
        "decoding": decoding_of_many_blocks(),
        "decoding of new blocks": decoding_of_new_blocks(),
    }
    shutdown()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
