"""The attention backend's decoding steps can be captured in a CUDA graph."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

pytest.importorskip("vllm")

from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.v1.attention.backend import CommonAttentionMetadata

from s2train.layouts.patterns import LocalVertical
from s2train.serving import backend
from s2train.serving.backend import S2Attention, S2Backend, S2MetadataBuilder
from s2train.serving.freeing import slots_of
from s2train.serving.kv_cache import S2Spec
from s2train.serving.pages import PagePlan

DIM, LENGTH, SEQUENCES, PAGES = 32, 320, 6, 200
SHAPES = [(2, 32), (3, 16)]  # KV heads and block: a page for each KV head, and one for all three


def heads(num_kv_heads: int) -> tuple[LocalVertical, ...]:
    return tuple(LocalVertical(1, 3, head) for head in range(2 * num_kv_heads))


def builder(num_kv_heads: int, block: int, device: str = "cpu") -> S2MetadataBuilder:
    plan = PagePlan.choose(block, num_kv_heads)
    spec = S2Spec(
        block_size=plan.page_tokens,
        num_kv_heads=num_kv_heads,
        head_size=DIM,
        dtype=torch.float32,
        layout_block=block,
        slots=slots_of(heads(num_kv_heads), num_kv_heads, plan.heads_per_page, 1),
        max_length=LENGTH,
        tokens_per_step=40,
    )
    config: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=SEQUENCES),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )
    return S2MetadataBuilder(spec, ["layer"], config, torch.device(device))


def attention(num_kv_heads: int, block: int) -> S2Attention:
    found = S2Attention(
        2 * num_kv_heads, DIM, DIM**-0.5, num_kv_heads, heads=heads(num_kv_heads), block_size=block, max_length=LENGTH
    )
    found.build_layout(torch.device("cpu"))
    return found


def decoding(lengths: Tensor, table: Tensor) -> CommonAttentionMetadata:
    """What vLLM says of a step with one new token of each sequence; padding has length 0."""
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        num_reqs=len(lengths),
        num_actual_tokens=len(lengths),
        max_query_len=1,
        max_seq_len=LENGTH,
        block_table_tensor=table,
        slot_mapping=torch.zeros_like(lengths, dtype=torch.int64),
    )


def random_step(count: int, num_kv_heads: int, block: int) -> tuple[Tensor, Tensor]:
    """Lengths and page tables of `count` sequences."""
    slots = PagePlan.choose(block, num_kv_heads).slots
    entries = LENGTH // block * slots
    table = (1 + torch.randperm(PAGES - 2))[: count * entries].view(count, entries).int()
    return torch.randint(1, LENGTH + 1, (count,), dtype=torch.int32), table


@pytest.mark.parametrize(("num_kv_heads", "block"), SHAPES)
def test_every_decoding_step_fills_the_same_tensors(num_kv_heads: int, block: int) -> None:
    build, shared = builder(num_kv_heads, block).build, PagePlan.choose(block, num_kv_heads).heads_per_page
    captured = build(0, decoding(*random_step(3, num_kv_heads, block)))
    lengths, pages = random_step(3, num_kv_heads, block)
    replayed = build(0, decoding(lengths, pages))
    for name in ("table", "positions"):
        first, second = getattr(captured, name), getattr(replayed, name)
        assert (first.data_ptr(), first.stride()) == (second.data_ptr(), second.stride())
    assert torch.equal(captured.positions, lengths - 1)
    slots = num_kv_heads // shared
    for sequence, head, j in ((random.randrange(3), h, random.randrange(LENGTH // block)) for h in range(num_kv_heads)):
        page = int(pages[sequence, j * slots + head // shared])
        assert captured.table[sequence, head, j] == 2 * shared * page + head % shared


@pytest.mark.parametrize(("num_kv_heads", "block"), SHAPES)
def test_padding_reads_and_writes_nothing(num_kv_heads: int, block: int) -> None:
    lengths, pages = random_step(2, num_kv_heads, block)
    padded = torch.cat([lengths, lengths.new_zeros(2)]), torch.cat([pages, torch.zeros_like(pages)])
    inputs = [torch.randn(4, count * num_kv_heads, DIM) for count in (2, 1, 1)]  # queries, keys, values
    plan = PagePlan.choose(block, num_kv_heads)
    cache = torch.randn(S2Backend.get_kv_cache_shape(PAGES, plan.page_tokens, num_kv_heads, DIM))
    found, build = attention(num_kv_heads, block), builder(num_kv_heads, block).build
    caches, outputs = [cache.clone(), cache.clone()], [torch.full_like(inputs[0], torch.nan)[:n] for n in (2, 4)]
    for step, own, output in zip(((lengths, pages), padded), caches, outputs, strict=True):
        given = (x[: len(output)] for x in inputs)
        found.forward(None, *given, own, build(0, decoding(*step)), output)
    # torch, which computes this on a CPU, writes padding's tokens to the last page; the GPU's kernel writes none
    assert torch.equal(caches[0][:-1], caches[1][:-1])
    assert torch.equal(outputs[0], outputs[1][:2])
    assert not outputs[1][2:].any()


def test_a_decoding_step_makes_the_host_read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without contents, on a CUDA device that needn't exist: reading one raises an error."""
    num_kv_heads, block = SHAPES[0]
    found = attention(num_kv_heads, block)
    calls: list[str] = []
    # The kernels' own capture is tested on GPUs (tests/kernels/test_decode.py).
    monkeypatch.setattr(backend, "append_token", lambda *_: calls.append("append"))
    monkeypatch.setattr(
        backend, "block_sparse_decode", lambda query, *_, **__: (calls.append("decode"), (query.clone(), None))[1]
    )
    with FakeTensorMode():
        lengths = torch.empty(4, dtype=torch.int32, device="cuda")
        entries = LENGTH // block * num_kv_heads
        step = decoding(lengths, torch.empty(4, entries, dtype=torch.int32, device="cuda"))
        query, key, value = (torch.empty(4, count * num_kv_heads, DIM, device="cuda") for count in (2, 1, 1))
        cache = torch.empty(S2Backend.get_kv_cache_shape(PAGES, block // num_kv_heads, num_kv_heads, DIM))
        metadata = builder(num_kv_heads, block, "cuda").build(0, step)
        found.forward(None, query, key, value, cache.cuda(), metadata, torch.empty_like(query))
        with pytest.raises(DataDependentOutputException):
            lengths.tolist()
    assert calls == ["append", "decode"]


def test_vllm_captures_whole_decoding_steps_and_pieces_of_prefills() -> None:
    support = S2MetadataBuilder.get_cudagraph_support(None, None)  # type: ignore[arg-type]
    config = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=CUDAGraphMode.FULL, splitting_ops=None)
    config.set_splitting_ops_for_v1(all2all_backend="naive")
    mode = config.resolve_cudagraph_mode_and_sizes(support, "S2Backend")
    assert (mode.decode_mode(), mode.mixed_mode()) == (CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE)
