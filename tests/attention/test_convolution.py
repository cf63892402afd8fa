"""SEA's convolutions compute in full precision, whatever torch's flag says, and leave the flag as it was."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from s2train.attention.selection.convolution import convolve
from s2train.attention.selection.sea import SeaScorer
from s2train.attention.weights import AttentionShape


class Convolutions(TorchDispatchMode):
    """Notes for each convolution that runs whether TF32 is allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" in str(func):
            self.found.append((func.__name__, torch.backends.cudnn.allow_tf32))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[True, False])
def allowed(request: pytest.FixtureRequest) -> Iterator[bool]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = request.param
    yield request.param
    torch.backends.cudnn.allow_tf32 = before


def test_no_pass_of_the_scorer_convolves_in_tf32(allowed: bool) -> None:
    scorer, shape = SeaScorer(features=4, channels=2), AttentionShape(32, 4, 2, 8)
    weights = {one.name: torch.randn(one.shape, requires_grad=True) for one in scorer.weights(shape)}
    features = scorer.pool_keys(torch.randn(1, 6, 16, 2, 8), weights.__getitem__)
    candidates = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril(-1)
    with Convolutions() as ran:
        scores = scorer.head_scores(torch.randn(1, 6, 4, 8), features, candidates, weights.__getitem__)
        assert torch.backends.cudnn.allow_tf32 == allowed
        scores.sum().backward()
    assert torch.backends.cudnn.allow_tf32 == allowed
    names = [name for name, _ in ran.found]
    assert names.count("convolution.default") == 2
    assert names.count("convolution_backward.default") == 4  # of maps and of weights
    assert not any(is_allowed for _, is_allowed in ran.found)


def test_outputs_and_gradients_are_those_of_torch() -> None:
    shapes = ((2, 6, int(torch.randint(3, 9, ())), int(torch.randint(5, 11, ()))), (4, 3, 3, 5))
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    found, expected = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    outputs = convolve(*found, 2), F.conv2d(*expected, groups=2)
    upstream = torch.randn_like(outputs[0])
    for out in outputs:
        out.backward(upstream)
    torch.testing.assert_close(*outputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
