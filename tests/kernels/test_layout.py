"""What a BlockLayout stores."""

import pytest
import torch
from s2train.kernels import BlockLayout


def random_mask(*shape: int) -> torch.Tensor:
    return torch.rand(*shape) < 0.5


def test_mask_comes_back() -> None:
    mask = random_mask(5, 7, 4)
    assert BlockLayout.from_mask(mask, 64).mask().equal(mask)


def test_rows_and_columns_are_ascending_and_say_the_same() -> None:
    mask = random_mask(1, 6, 9)
    layout = BlockLayout.from_mask(mask, 64)
    for i in range(6):
        row = layout.row_columns[layout.row_offsets[i] : layout.row_offsets[i + 1]]
        assert row.tolist() == mask[0, i].nonzero().flatten().tolist()
    for j in range(9):
        column = layout.column_rows[layout.column_offsets[j] : layout.column_offsets[j + 1]]
        assert column.tolist() == mask[0, :, j].nonzero().flatten().tolist()


def test_equal_heads_are_stored_once() -> None:
    a, b = torch.eye(4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)
    layout = BlockLayout.from_mask(torch.stack([a, b, a, a]), 64)
    assert layout.pattern_of_head.tolist() == [0, 1, 0, 0]
    assert layout.row_columns.numel() == 4 + 16
    assert layout.nbytes < BlockLayout.from_mask(torch.stack([a, b, b.triu(), a]), 64).nbytes


def test_patterns_and_masks_build_the_same() -> None:
    masks = random_mask(2, 5, 5)
    layout = BlockLayout.from_patterns(masks, [1, 0, 1], 128)
    assert layout.mask().equal(masks[[1, 0, 1]])
    assert layout.num_heads == 3


def test_heads_slices_share_storage() -> None:
    mask = random_mask(6, 5, 5)
    layout = BlockLayout.from_mask(mask, 64)
    part = layout.heads(2, 5)
    assert part.mask().equal(mask[2:5])
    assert part.row_columns is layout.row_columns


def test_index_tensors_are_int32() -> None:
    layout = BlockLayout.from_mask(random_mask(2, 3, 3), 16)
    assert {t.dtype for t in layout._tensors().values()} == {torch.int32}


def test_columns_by_work_starts_with_the_longest() -> None:
    # two KV heads of two query heads each; columns kept 4 + 4, 1 + 0 and 0 + 0, 3 + 1 times
    mask = torch.zeros(4, 4, 2, dtype=torch.bool)
    mask[0, :, 0] = mask[1, :, 0] = True
    mask[0, 0, 1] = True
    mask[2, :3, 1] = mask[3, 0, 1] = True
    order = BlockLayout.from_mask(mask, 64).columns_by_work(2)
    assert order.tolist() == [0, 3, 1, 2]


@pytest.mark.parametrize("block_size", [0, 8, 48, 512])
def test_unsupported_block_sizes_are_refused(block_size: int) -> None:
    with pytest.raises(ValueError, match="block_size"):
        BlockLayout.from_mask(random_mask(1, 2, 2), block_size)


@pytest.mark.parametrize("mask", [torch.ones(1, 2, 2), torch.ones(2, 2) > 0, torch.ones(0, 2, 2) > 0])
def test_masks_of_other_dtypes_and_ranks_are_refused(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="mask"):
        BlockLayout.from_mask(mask, 64)


@pytest.mark.parametrize("heads", [[], [2], [-1]])
def test_patterns_that_do_not_exist_are_refused(heads: list[int]) -> None:
    with pytest.raises(ValueError, match="pattern_of_head"):
        BlockLayout.from_patterns(random_mask(2, 3, 3), heads, 64)
