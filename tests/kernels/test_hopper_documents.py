"""Tiles that don't fill 128 rows: packed documents and query offsets, as the Hopper forward walks and stores them."""

import pytest
import s2train.kernels.triton_backend  # noqa: F401  (repairs Triton's interpreter)
import torch
from s2train.kernels import BlockLayout, block_sparse_attention
from s2train.kernels.hopper.documents import document_table
from s2train.kernels.hopper.forward_schedule import TILE, forward_schedule
from s2train.kernels.token_mask import token_mask

HALF = TILE // 2


def random_documents() -> list[int]:
    """Lengths, of all kinds: none, one, whole tiles, anything."""
    kinds = [0, 0, 1, 63, 64, 127, 128, 129, 256, *torch.randint(2, 700, (5,)).tolist()]
    return [kinds[i] for i in torch.randperm(len(kinds)).tolist()[: int(torch.randint(1, 12, ()))]] + [5]


def packed(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("attempt", range(3))
def test_table_lists_every_tile_of_every_document(attempt: int, device: torch.device) -> None:
    lengths = random_documents()
    table = document_table(packed(lengths, device), sum(lengths), TILE, {}).cpu()
    starts = packed(lengths, torch.device("cpu")).tolist()
    expected = [
        (tile, document) for document, length in enumerate(lengths) for tile in range(-(-length // TILE))
    ]  # fmt: skip
    # those that see the most keys first, else in the documents' order
    expected.sort(key=lambda entry: (-entry[0], entry[1]))
    assert table[0, 0] == len(expected) < len(table)
    assert table[1 : len(expected) + 1, :3].tolist() == [[starts[d], lengths[d], tile] for tile, d in expected]


@pytest.mark.parametrize("dtype", [torch.int32, pytest.param(torch.int64, marks=pytest.mark.long)])
def test_table_of_more_documents_and_tiles_than_a_program_takes(dtype: torch.dtype, device: torch.device) -> None:
    lengths = [1] * 70 + [TILE * 130 + 1] + [0] * 70 + [3]
    table = document_table(packed(lengths, device).to(dtype), sum(lengths), TILE, {}).cpu()
    assert table[0, 0] == 70 + 131 + 1
    assert table[1 : table[0, 0] + 1, 2].tolist() == [*range(130, 0, -1), *([0] * 72)]
    assert table[131:203, 0].tolist() == [*range(71), sum(lengths) - 3]


def test_table_of_documents_that_all_are_empty_but_the_last(device: torch.device) -> None:
    table = document_table(packed([0, 0, 7], device), 7, TILE, {}).cpu()
    assert table[:2, :3].tolist() == [[1, *table[0, 1:3].tolist()], [0, 7, 0]]


@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize("keep", [0.3, 1.0])
def test_packed_documents_attend_to_what_the_layout_keeps(block: int, keep: float, device: torch.device) -> None:
    lengths = random_documents()
    rows, longest = sum(lengths), max(lengths)
    layout = BlockLayout.from_mask(torch.rand(3, -(-longest // block), -(-longest // block)) < keep, block)
    schedule = forward_schedule(layout, causal=True, query_end=rows, s_k=rows)
    table = document_table(packed(lengths, device), rows, TILE, {}).tolist()
    seen = torch.zeros(3, rows, rows, dtype=torch.bool)
    per_step = TILE // schedule.chunk_keys
    for head, slot in zip(schedule.head_order.tolist(), schedule.head_slot.tolist(), strict=True):
        for start, length, tile, _ in table[1 : table[0][0] + 1]:
            place = slot * schedule.tiles_per_pattern + tile
            begin, end = schedule.step_offsets[place : place + 2].tolist()
            for step in range(begin, end):
                for entry in schedule.chunks[step * per_step : (step + 1) * per_step].tolist():
                    keys = entry // 4 * schedule.chunk_keys + torch.arange(schedule.chunk_keys)
                    if entry % 4 and keys[-1] >= length:
                        assert step == begin, "values beyond the document are cleared in the first step only"
                    for half in range(2):
                        query = tile * TILE + half * HALF + torch.arange(HALF)
                        query = query[query < length]
                        part = torch.ones(len(query), len(keys), dtype=torch.bool)
                        if step < int(schedule.full_offsets[place]):
                            part = (keys <= query[:, None]) & bool(entry >> half & 1)
                        visible = keys[part.any(0)]
                        assert not (visible >= length).any()
                        part = part[:, keys < length]
                        seen[head, start + query[:, None], start + keys[keys < length]] |= part
    bounds = packed(lengths, torch.device("cpu"))
    assert seen.equal(token_mask(layout, rows, rows, causal=True, cu_seqlens=bounds))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, in the interpreter
@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize("garbage", [torch.nan, pytest.param(torch.inf, marks=pytest.mark.long)])
def test_infinities_stay_in_their_document(block: int, garbage: float, device: torch.device) -> None:
    lengths = [100, 150, 70]
    q, k, v = torch.randn(3, sum(lengths), 1, 2, 64, device=device).to(torch.bfloat16)
    layout = BlockLayout.from_mask(torch.ones(2, 256 // block, 256 // block, device=device) > 0, block)

    def attend() -> tuple[torch.Tensor, torch.Tensor]:
        return block_sparse_attention(
            q, k, v, layout, cu_seqlens=packed(lengths, device), return_lse=True, backend="triton"
        )

    out, lse = attend()
    for x in (q, k, v):
        x[100:250] = garbage
    others = [*range(100), *range(250, 320)]
    disturbed_out, disturbed_lse = attend()
    assert disturbed_out[others].equal(out[others])
    assert disturbed_lse[..., others].equal(lse[..., others])
