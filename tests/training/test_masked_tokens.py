"""A step's gradient is that of the mean over all tokens that count, however they are spread over its parts."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from s2train.megatron.clipping import clip
from s2train.training.steps import token_loss

MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1]]).float()


def optimizer_of(weight: torch.nn.Parameter, clip_grad: float) -> Any:
    config = SimpleNamespace(clip_grad=clip_grad, use_precision_aware_optimizer_no_fp8_or_ds_fp8=False)
    return SimpleNamespace(config=config, get_parameters=lambda: [weight])


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("clip_grad", [0.0, 0.1, 1e3])
def test_micro_batches_of_any_size_give_the_gradient_of_the_mean_over_counted_tokens(
    rows: int, clip_grad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    weight, factors = torch.nn.Parameter(torch.randn(4)), torch.randn(*MASK.shape, 4)
    whole = torch.autograd.grad(((factors @ weight) * MASK).sum() / MASK.sum(), weight)[0]
    parts = list(zip(factors.split(rows), MASK.split(rows), strict=True))
    for part, mask in parts:
        loss, number, _ = token_loss(mask, None, part @ weight)
        (loss / number.clamp(min=1) / len(parts)).backward()  # as Megatron's schedules do
    clip(optimizer_of(weight, clip_grad), float(whole.norm()), float(MASK.mean()))
    factor = min(1.0, clip_grad / float(whole.norm())) if clip_grad else 1.0
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, whole * factor, rtol=1e-4, atol=1e-6)
