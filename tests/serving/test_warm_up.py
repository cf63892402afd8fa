"""Kernels are compiled before the first request, in every form that steps need."""

import dataclasses
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("vllm")

from vllm.v1.attention.backend import CommonAttentionMetadata

from s2train.serving import backend, warm_up
from s2train.serving.backend import S2Backend, kernel_layout
from s2train.serving.pages import PagePlan
from s2train.serving.warm_up import compile_kernels
from tests.serving.test_backend import (
    DIM,
    LENGTH,
    PAGES,
    SHAPES,
    attention,
    builder,
    decoding,
    heads,
    random_step,
)

TOKENS = 40
CPU = torch.device("cpu")


class Calls:
    """Stands in for the kernels; records what a GPU compiles them for.

    A form is what the compiler is given besides the tensors' addresses: where queries begin in a tile of 128 rows, and
    which sizes and strides are 1 or a multiple of 16.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forms: set[Any] = set()
        for module in (backend, warm_up):
            monkeypatch.setattr(module, "block_sparse_attention", self.attend)
            monkeypatch.setattr(module, "append_token", self.append)
            monkeypatch.setattr(module, "block_sparse_decode", self.decode)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Any, *, softmax_scale: float, query_offset: int
    ) -> Tensor:
        assert len(k) == len(v) == query_offset + len(q)
        self.forms.add(("attend", query_offset % 128 != 0, *(_strides(x) for x in (q, k, v))))
        return torch.empty_like(q)

    def append(self, *tensors: Tensor) -> None:
        self.forms.add(("append", *(_strides(x) for x in tensors[:-1])))

    def decode(
        self, q: Tensor, *pages: Any, softmax_scale: float, num_splits: int | None = None
    ) -> tuple[Tensor, None]:
        for splits in range(1, 129) if num_splits is None else (num_splits,):
            self.forms.add(("decode", (splits - 1).bit_length(), *(_strides(x) for x in (q, *pages[:3]))))
        return torch.empty_like(q), None


def _strides(x: Tensor) -> tuple[Any, ...]:
    return (x.dtype, *("1" if n == 1 else n % 16 == 0 for n in x.stride()))


def mixed_step(lengths: list[int], start: int, num_kv_heads: int, block: int) -> CommonAttentionMetadata:
    """What vLLM says of a step: sequences that decode, and one whose prompt is computed from `start` on."""
    count = TOKENS - len(lengths)
    bounds = torch.tensor([*range(len(lengths) + 1), TOKENS], dtype=torch.int32)
    stops = torch.tensor([*lengths, start + count], dtype=torch.int32)
    _, table = random_step(len(stops), num_kv_heads, block)
    return dataclasses.replace(
        decoding(stops, table),
        query_start_loc=bounds,
        query_start_loc_cpu=bounds,
        num_actual_tokens=TOKENS,
        max_query_len=count,
    )


def projections(num_kv_heads: int, count: int) -> list[Tensor]:
    """Queries, keys and values of a step, as vLLM passes them: parts of one tensor."""
    rows = torch.zeros(count, 4 * num_kv_heads * DIM)
    sizes = [heads * DIM for heads in (2 * num_kv_heads, num_kv_heads, num_kv_heads)]
    return [x.view(count, -1, DIM) for x in rows.split(sizes, dim=1)]


@pytest.mark.parametrize(("num_kv_heads", "block"), SHAPES)
def test_steps_need_no_form_that_was_not_compiled(
    num_kv_heads: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, found, build = Calls(monkeypatch), attention(num_kv_heads, block), builder(num_kv_heads, block).build
    blocks, tensors = LENGTH // block, projections(num_kv_heads, TOKENS)
    gathered = torch.zeros(2, num_kv_heads, blocks * block, DIM)
    compile_kernels(*tensors, gathered, kernel_layout(heads(num_kv_heads), block, LENGTH, CPU), blocks, DIM**-0.5)
    compiled, calls.forms = calls.forms, set()
    cache = torch.zeros(
        S2Backend.get_kv_cache_shape(PAGES, PagePlan.choose(block, num_kv_heads).page_tokens, num_kv_heads, DIM)
    )
    for start in (0, 1, block, 128, 200, LENGTH - TOKENS + 2):
        step = mixed_step([random.randint(1, LENGTH), random.randint(1, LENGTH)], start, num_kv_heads, block)
        found.forward(None, *tensors, cache, build(0, step), torch.empty_like(tensors[0]))
    assert {form[0] for form in calls.forms} == {"attend", "append", "decode"}
    assert calls.forms <= compiled


def test_kernels_are_compiled_once_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without contents, on a CUDA device that needn't exist."""
    calls, found = Calls(monkeypatch), attention(*SHAPES[0])
    with FakeTensorMode():
        tensors = [x.cuda() for x in projections(SHAPES[0][0], TOKENS)]
        for compiles in (True, False):  # vLLM's profile, then its other steps before requests
            calls.forms.clear()
            found.forward(None, *tensors, torch.empty(0), None, torch.empty_like(tensors[0]))
            assert bool(calls.forms) == compiles
