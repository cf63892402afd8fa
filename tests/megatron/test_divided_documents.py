"""Documents divided over context parallel ranks attend as in one process, and ranks send only what is needed."""

import random

import numpy as np
import pytest
import torch

from s2train.layouts.host_layout import HostLayout
from s2train.megatron.context_parallel.document_plan import document_plan
from s2train.megatron.context_parallel.documents import ContinuedDocument, divided_documents
from tests.megatron.cp_processes import BLOCK, CASES, NAMES
from tests.megatron.document_processes import (
    BLOCKS_PER_CHUNK,
    LAYOUTS,
    WAYS,
    Result,
    brute_force_tokens,
    make_documents,
    run,
)

Results = dict[tuple[str, str, str, torch.dtype], list[Result]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run(2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_and_gradients_are_those_of_one_process(ranks: Results, layout: str, way: str) -> None:
    found = {key[1]: results for key, results in ranks.items() if (key[0], *key[2:]) == (layout, way, torch.float64)}
    assert len(found) == 4
    for documents, results in found.items():
        for result in results:
            assert all(result.error[name] < 1e-13 for name in NAMES), (documents, result.error)


@pytest.mark.parametrize("way", WAYS)
def test_they_are_as_exact_in_float32(ranks: Results, way: str) -> None:
    for key, results in ranks.items():
        if key[2:] == (way, torch.float32):
            for result in results:
                assert all(result.error[name] < 2 * result.allowed[name] for name in NAMES), (key, result)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_send_exactly_the_tokens_that_are_needed(name: str, size: int) -> None:
    random.seed(seed := random.randrange(2**31))
    layout, kv_heads = CASES[name].make(2 * size * BLOCKS_PER_CHUNK), CASES[name].kv_heads
    for documents, bounds in make_documents(size).items():
        expected = brute_force_tokens(layout, kv_heads, bounds, size)
        for rank in range(size):
            divided = divided_documents(bounds, int(bounds[0, -1]), rank, size, "cpu")
            plan = document_plan(divided, HostLayout.of(layout), kv_heads, rank, size, "cpu")
            assert plan.received == expected[rank].tolist(), (seed, documents)
            assert plan.sent_counts == expected[:, rank].tolist(), (seed, documents)


def test_documents_that_begin_with_their_chunks_need_no_exchange() -> None:
    length, rows = 4 * BLOCKS_PER_CHUNK * BLOCK, BLOCKS_PER_CHUNK * BLOCK
    bounds = torch.arange(0, length + 1, rows, dtype=torch.int32)[None]
    layout = CASES["dense heads"].make(4 * BLOCKS_PER_CHUNK)
    plan = document_plan(divided_documents(bounds, length, 0, 2, "cpu"), HostLayout.of(layout), 2, 0, 2, "cpu")
    assert plan.received == plan.sent_counts == [0, 0]


def test_planning_a_micro_batch_reads_nothing_from_the_device() -> None:
    layout = HostLayout.of(CASES["shifted"].make(4 * BLOCKS_PER_CHUNK))
    for bounds in make_documents(2).values():
        divided = divided_documents(bounds, int(bounds[0, -1]), 0, 2, "meta")
        plan = document_plan(divided, layout, 2, 0, 2, "meta")  # nothing can be read from a meta tensor
        assert {x.device.type for x in (*plan.places, *plan.sent, plan.returned.order)} == {"meta"}
        keys = [planned for of_chunks in plan.keys for planned in of_chunks if planned]
        assert {own_layout.device.type for _, _, own_layout in keys} == {"meta"}


def test_a_layout_of_later_queries_has_what_they_keep() -> None:
    layout = CASES["random"].make(12)
    documents = divided_documents(torch.tensor([[0, 12 * BLOCK]], dtype=torch.int32), 12 * BLOCK, 0, 2, "cpu")
    expected = layout.mask().tril()[:, :8, :8]
    expected[:, :3] = False
    assert documents.later_layout(layout, 3 * BLOCK + 5, 5 * BLOCK - 5).mask().equal(expected)


def test_a_chunk_has_one_continued_document_and_those_that_begin_in_it() -> None:
    bounds = np.array([0, 3, 3, 10, 14, 16, 16], np.int32)
    found = [ContinuedDocument.of_chunk(bounds, chunk, 4) for chunk in range(4)]
    assert [(part.first, part.length) for part in found] == [(0, 0), (3, 4), (3, 2), (10, 2)]
    documents = divided_documents(torch.from_numpy(bounds)[None], 16, 0, 2, "cpu")
    assert [[part.tolist() for part in parts] for parts in documents.begun] == [[[0, 3, 4], [0, 2]]]
    other = divided_documents(torch.from_numpy(bounds)[None], 16, 1, 2, "cpu")
    assert other.begun[0][0] is None
    assert other.begun[0][1].tolist() == [0, 2]
