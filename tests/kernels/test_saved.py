"""What hooks on saved tensors return is read correctly by the backward, or rejected."""

from collections.abc import Callable

import pytest
import torch
from s2train.kernels import BlockLayout, block_sparse_attention
from s2train.kernels.hyper import hyper_attention
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests.kernels.hyper.cases import SMALL

Op = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTH, BLOCK, SEEDS = 48, 16, torch.ones(2, 2, dtype=torch.int64, device=DEVICE)
LAYOUT = BlockLayout.from_mask(torch.ones(2, 3, 3, dtype=torch.bool), BLOCK).to(DEVICE)
OPS: dict[str, Op] = {
    "block-sparse": lambda q, k, v: block_sparse_attention(q, k, v, LAYOUT, return_lse=True, backend="triton"),
    "hyper": lambda q, k, v: hyper_attention(q, k, v, SMALL, *SEEDS, return_lse=True, backend="triton"),
}
each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())


def random() -> list[Tensor]:
    return [torch.randn(LENGTH, 1, 2, 16, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]


def gradients(op: Op, inputs: list[Tensor], returned: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Gradients of q, k and v where hooks return something else than was saved."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with saved_tensors_hooks(lambda x: x, returned):
        results = op(*leaves)
    given = [torch.arange(x.numel(), dtype=x.dtype, device=DEVICE).view_as(x).sin() for x in results]
    return list(torch.autograd.grad(results, leaves, given))


@each_op
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_tensors_with_other_strides_are_read_as_those_that_were_saved(op: Op, is_compiled: bool) -> None:
    inputs = random()
    expected = gradients(op, inputs, lambda x: x)
    called: Op = torch.compile(lambda q, k, v: op(q, k, v), backend="aot_eager") if is_compiled else op
    found = gradients(called, inputs, lambda x: x.transpose(0, -1).contiguous().transpose(0, -1))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@each_op
@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda x: x.double(), r"torch.bfloat16, .* returned \[.*, torch.float64, "),
        (lambda x: x[..., :1], r"returned \[.*1\], torch.bfloat16"),
        (lambda x: x.to("meta"), "returned .* meta"),
        (lambda x: x.to_sparse(), "torch.strided, .* returned .* torch.sparse_coo"),
    ],
    ids=["dtype", "shape", "device", "layout"],
)
def test_a_tensor_of_another_kind_is_rejected(op: Op, returned: Callable[[Tensor], Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=f"^q was saved for the backward as .*{words}.*: make it return a tensor like"):
        gradients(op, random(), returned)
