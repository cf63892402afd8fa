"""Attention over no keys, or of no queries, is zero and not an error, on every backend."""

import pytest
import torch
from s2train.kernels import BlockLayout, block_sparse_attention


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("s_q", "s_k", "return_lse", "is_compiled"),
    [
        (40, 0, True, False),
        (0, 40, False, False),
        (0, 0, True, False),
        (40, 0, False, True),
        pytest.param(0, 40, True, True, marks=pytest.mark.long),
        pytest.param(0, 0, False, True, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_output_and_gradients_are_zero_and_lse_is_minus_infinity(
    backend: str, s_q: int, s_k: int, return_lse: bool, is_compiled: bool, device: torch.device
) -> None:
    def step(*inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return block_sparse_attention(*inputs, layout, return_lse=return_lse, backend=backend)  # type: ignore[call-overload, no-any-return]

    torch._dynamo.reset()
    layout = BlockLayout.from_mask(torch.ones(4, 2, 2) > 0, 32, device=device)
    q = torch.randn(s_q, 2, 4, 16, device=device, requires_grad=True)
    k, v = (torch.randn(s_k, 2, 2, 16, device=device, requires_grad=True) for _ in range(2))
    found = (torch.compile(step, backend="aot_eager", fullgraph=True) if is_compiled else step)(q, k, v)
    out, lse = found if isinstance(found, tuple) else (found, None)
    assert out.shape == (s_q, 2, 4, 16)
    assert not out.any()
    if lse is not None:
        assert lse.shape == (2, 4, s_q)
        assert (lse == -torch.inf).all()
    for x, gradient in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert gradient.shape == x.shape
        assert not gradient.any()
