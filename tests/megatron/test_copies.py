"""Copies of 16 bytes are taken only where torch allows them."""

import torch

from s2train.megatron.context_parallel.copies import put, take, wide


def test_a_dimension_of_one_with_an_odd_stride_is_copied_by_elements() -> None:
    x = torch.arange(4.0 * 16).as_strided((4, 1, 2, 8), (16, 3, 8, 1))  # contiguous for torch
    assert x.is_contiguous()
    where = (torch.tensor([2, 0]),)
    packed = take(wide(x, x), where)
    assert packed.dtype == x.dtype
    target = torch.zeros_like(x)
    put(packed, (target, torch.zeros_like(x)), where)
    assert target[[2, 0]].equal(x[[2, 0]])
