"""Partial results over ranges of keys, merged by their log-sum-exp and trained through, are the whole's."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from s2train.kernels import BlockLayout, block_sparse_attention, reference_attention
from tests.kernels.cases import NAMES, Problem, gradients

Attend = Callable[..., tuple[Tensor, Tensor]]
BLOCK = 32


def merged(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, offset: int, cut: int
) -> tuple[Tensor, Tensor]:
    """Queries from position `offset` on over the keys before `cut` and those from it on, which begin anew at 0."""
    early = BlockLayout.from_mask(mask[:, :, : cut // BLOCK], BLOCK, device=q.device)
    late = BlockLayout.from_mask(mask[:, cut // BLOCK :, cut // BLOCK :], BLOCK, device=q.device)
    parts = [
        attend(q, k[:cut], v[:cut], early, query_offset=offset),
        attend(q, k[cut:], v[cut:], late, query_offset=offset - cut),
    ]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    shift = lse.masked_fill(lse == -torch.inf, 0)
    out = sum(out * (part - shift).exp().permute(2, 0, 1)[..., None] for out, part in parts)
    assert isinstance(out, Tensor)
    return out, lse


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1)])
def test_two_ranges_of_keys_have_the_gradients_of_the_whole(
    backend: str, heads: int, kv_heads: int, device: torch.device
) -> None:
    offset, cut, s_k = 40, 32, 110
    problem = Problem(heads, kv_heads, s_q=s_k - offset, s_k=s_k, options={"query_offset": offset})
    inputs, layout, dout, dlse = problem.make(device)
    mask = layout.mask()
    mask[:, torch.arange(1, 4), torch.arange(1, 4)] = True  # torch differentiates no logaddexp(-inf, -inf)

    def results(attend: Attend, dtype: torch.dtype, whole: bool) -> tuple[Tensor, ...]:
        cast = [x.detach().to(dtype).requires_grad_() for x in inputs]
        if whole:
            full = BlockLayout.from_mask(mask, BLOCK, device=device)
            return gradients(*attend(*cast, full, query_offset=offset), cast, dout, dlse)
        return gradients(*merged(attend, *cast, mask, offset, cut), cast, dout, dlse)

    ours = results(partial(block_sparse_attention, return_lse=True, backend=backend), torch.float32, whole=False)
    plain = results(reference_attention, torch.float32, whole=False)
    exact = results(reference_attention, torch.float64, whole=True)
    for name, x, same_dtype, x64 in zip(NAMES, ours, plain, exact, strict=True):
        error, allowed = (x.double() - x64).norm(), (same_dtype.double() - x64).norm()
        assert error <= 2 * allowed + 3e-7 * x64.norm(), name
