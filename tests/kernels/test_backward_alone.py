"""Backwards run without their forwards."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from s2train.kernels import BlockLayout, block_sparse_attention, triton_backend
from s2train.kernels.backward_alone import forwards_left_out

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("format", ["sbhd", "bshd"])
def test_the_backward_gets_tensors_like_the_forwards(format: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = BlockLayout.from_mask(torch.ones(2, 2, 2, dtype=torch.bool), 16).to(DEVICE)
    given: list[Any] = []
    backward = triton_backend.run_backward

    def recorded(*arguments: Any) -> Any:
        given.append([(x.shape, x.stride(), x.dtype) for x in arguments[:6]])
        return backward(*arguments)

    monkeypatch.setattr(triton_backend, "run_backward", recorded)
    q, k, v = (torch.randn(32, 32, 2, 16, device=DEVICE, requires_grad=True)[:, :1] for _ in range(3))

    def run() -> torch.Tensor:
        inputs = [x.transpose(0, 1) if format == "bshd" else x for x in (q, k, v)]
        out = block_sparse_attention(*inputs, layout, format=format, backend="triton")
        out.backward(torch.ones_like(out))
        return out

    expected = run()
    with forwards_left_out():
        assert torch.equal(run(), torch.zeros_like(expected))
    assert torch.equal(run(), expected)  # forwards run again
    assert given[0] == given[1] == given[2]


@pytest.mark.parametrize(("queries", "statistics"), [((2, 32, 4), (2, 4, 32)), ((32, 4), (4, 32))])
def test_flash_attention_4s_forward_is_left_out_if_it_is_imported(
    queries: tuple[int, ...], statistics: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    interface = SimpleNamespace(_flash_attn_fwd=lambda *_: "computed")
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)
    q, v = (torch.ones(*queries, width, dtype=torch.bfloat16) for width in (64, 32))
    with forwards_left_out():
        out, lse, *others = interface._flash_attn_fwd(q, q, v, causal=True)
    assert out.equal(torch.zeros(*queries, 32, dtype=torch.bfloat16))
    assert lse.equal(torch.zeros(statistics))
    assert others == [None] * 3
    assert interface._flash_attn_fwd(q, q, v) == "computed"
