"""A linear layer recomputes the norm before it in the backward, and saves nothing of its output."""

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn

from s2train.megatron.recomputed_norm import recompute_output


class Pair(nn.Module):
    """A norm and a linear layer, whose calls keep weak references to the norm's outputs."""

    def __init__(self, recomputes: bool) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(24), nn.Linear(24, 8)
        self.outputs: list[weakref.ref[Tensor]] = []
        if recomputes:
            recompute_output(self.norm, self.linear)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        self.outputs.append(weakref.ref(normed.untyped_storage()))
        out: Tensor = self.linear(normed)
        return out


@pytest.fixture
def pairs() -> tuple[Pair, Pair]:
    """Without and with recomputation, and the same weights."""
    plain, recomputing = Pair(False), Pair(True)
    nn.init.normal_(plain.norm.weight)
    recomputing.load_state_dict(plain.state_dict())
    return plain, recomputing


def gradients(pair: Pair, inputs: list[Tensor]) -> list[Tensor]:
    """Of a loss over several calls before one backward, as pipelines have."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    sum((pair(x).square().sum() for x in leaves), torch.zeros(())).backward()
    return [x.grad for x in [*leaves, *pair.parameters()] if x.grad is not None]


def test_gradients_of_several_micro_batches_are_equal_bit_for_bit(pairs: tuple[Pair, Pair]) -> None:
    inputs = [torch.randn(5, 2, 24) for _ in range(3)]
    expected, found = (gradients(pair, inputs) for pair in pairs)
    assert len(expected) == 6
    assert all(map(torch.equal, found, expected))


def test_the_output_is_freed_before_the_backward(pairs: tuple[Pair, Pair]) -> None:
    kept = [(pair, pair(torch.randn(5, 2, 24, requires_grad=True))) for pair in pairs]
    assert [pair.outputs[0]() is None for pair, _ in kept] == [False, True]


def test_a_call_that_fails_changes_no_later_one(pairs: tuple[Pair, Pair]) -> None:
    plain, recomputing = pairs
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        recomputing.linear(recomputing.norm(torch.randn(3, 24))[:, :7])
    with torch.no_grad():
        recomputing(torch.randn(3, 24))
    other = torch.randn(3, 24, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        other.exp()
    assert len(saved) == 1  # by the test's hooks, not by those of the failed call
    inputs = [torch.randn(5, 2, 24)]
    assert all(map(torch.equal, gradients(recomputing, inputs), gradients(plain, inputs)))


def test_a_copy_recomputes_with_its_own_weights(pairs: tuple[Pair, Pair]) -> None:
    _, recomputing = pairs
    other = copy.deepcopy(recomputing)
    with torch.no_grad():
        other.norm.weight.mul_(2)
    plain = Pair(False)
    plain.load_state_dict(other.state_dict())
    inputs = [torch.randn(5, 2, 24)]
    assert all(map(torch.equal, gradients(other, inputs), gradients(plain, inputs)))
