"""Gradient norm and clipping match their definitions, in place of Megatron's stand-ins only."""

import pytest
import torch
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale

from s2train.megatron.clipping import replace_stand_ins

_SHAPES = ((257, 33), (1,), (0,), (4096,), (3, 5, 7))
_NO_FLAG = torch.zeros(1)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_grads, "l2_norm_impl", local_multi_tensor_l2_norm)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", local_multi_tensor_scale)
    replace_stand_ins()


@pytest.mark.usefixtures("stand_ins")
def test_the_norm_is_that_of_all_tensors_together() -> None:
    tensors = [torch.randn(shape) for shape in _SHAPES]
    exact = torch.cat([one.double().flatten() for one in tensors]).norm()
    norm, _ = clip_grads.l2_norm_impl(2048, _NO_FLAG, [tensors], False)
    assert norm.shape == (1,)
    assert norm.item() == pytest.approx(exact.item(), rel=2 * torch.finfo(torch.float32).eps)


@pytest.mark.usefixtures("stand_ins")
def test_the_norm_of_a_gradient_that_is_not_finite_is_not_finite() -> None:
    norm, _ = clip_grads.l2_norm_impl(2048, _NO_FLAG, [[torch.ones(3), torch.tensor([float("nan")])]], False)
    assert norm.isnan()


@pytest.mark.usefixtures("stand_ins")
def test_clipping_scales_every_tensor_in_place() -> None:
    tensors = [torch.randn(shape) for shape in _SHAPES]
    expected = [one * 0.3 for one in tensors]
    clip_grads.multi_tensor_scale_impl(2048, _NO_FLAG, [tensors, tensors], 0.3)
    assert all(torch.equal(one, other) for one, other in zip(tensors, expected, strict=True))


def test_kernels_of_an_installed_library_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_a_library() -> None: ...

    monkeypatch.setattr(clip_grads, "l2_norm_impl", of_a_library)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", of_a_library)
    replace_stand_ins()
    assert clip_grads.l2_norm_impl is clip_grads.multi_tensor_scale_impl is of_a_library
