"""Which kernels run can be chosen, and asked for with the reason."""

from typing import Any

import pytest
import torch
import triton
from s2train.kernels import BlockLayout, block_sparse_attention, kernels_in_use, triton_backend
from s2train.kernels.dispatch import why_no_hopper
from s2train.kernels.hopper import support as hopper_support
from torch import Tensor

from tests.kernels.cases import Problem, assert_as_exact_as_torch


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is made as on a Hopper GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(hopper_support, "is_hopper", lambda device: True)


def arguments(
    dtype: torch.dtype = torch.bfloat16, block: int = 128, dim: int = 128, v_dim: int | None = None, s: int = 512
) -> tuple[Tensor, Tensor, Tensor, BlockLayout]:
    q, k, v = (torch.randn(s, 1, 2, d, dtype=dtype) for d in (dim, dim, v_dim or dim))
    return q, k, v, BlockLayout.from_mask(torch.rand(2, -(-s // block), -(-s // block)) < 0.5, block)


@pytest.mark.usefixtures("hopper")
def test_what_training_uses_runs_on_hoppers_kernels() -> None:
    used = kernels_in_use(*arguments(), backend="triton")
    assert (used.forward, used.backward) == ("hopper", "hopper")
    assert str(used) == "forward hopper, backward hopper"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"dtype": torch.float32}, ["float32"]),
        ({"block": 16}, ["blocks of 16"]),
        ({"dim": 256}, ["head dimensions 256, 256"]),
        ({"dtype": torch.float32, "block": 32}, ["float32", "blocks of 32"]),
    ],
    ids=str,
)
def test_each_property_that_hoppers_kernels_do_not_take_is_named(changes: dict[str, Any], reasons: list[str]) -> None:
    used = kernels_in_use(*arguments(**changes), backend="triton")
    assert (used.forward, used.backward) == ("portable", "portable")
    assert used.why_forward.split(", ") == ", ".join(reasons).split(", ")
    assert all(reason in used.why_backward for reason in reasons)


@pytest.mark.usefixtures("hopper")
def test_an_unaligned_tensor_is_named() -> None:
    q, k, v, layout = arguments()
    unaligned = torch.randn(k.numel() + 1, dtype=k.dtype)[1:].view(k.shape)
    assert kernels_in_use(q, unaligned, v, layout, backend="triton").why_forward == "address or strides of k"


@pytest.mark.usefixtures("hopper")
def test_deterministic_gradients_are_the_portable_kernels_and_said_to_be() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        used = kernels_in_use(*arguments(), backend="triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert used.forward == "hopper"
    if used.backward == "portable":  # Hopper's own may become deterministic
        assert "deterministic" in used.why_backward


@pytest.mark.usefixtures("hopper")
def test_the_portable_backend_takes_no_hopper_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def reject(*_: Any) -> Any:
        raise AssertionError("asked for a Hopper kernel")

    monkeypatch.setattr(triton_backend, "kernel_choice", reject)
    monkeypatch.setattr(triton_backend, "backward_choice", reject)
    q, k, v, layout = arguments(s=128)
    q.requires_grad_()
    block_sparse_attention(q, k, v, layout, backend="portable").sum().backward()
    used = kernels_in_use(q, k, v, layout, backend="portable")
    assert (used.forward, used.why_forward) == ("portable", "backend=portable")


def test_a_triton_that_they_do_not_run_in_is_named_beside_the_one_that_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    why = why_no_hopper(torch.device("cuda"))
    assert why.startswith("Triton 4.0.0: Hopper kernels need one of 3.6.x, ")
    assert "torch 2.11 to 2.15" in why


def test_a_cpu_runs_torch_and_says_so() -> None:
    used = kernels_in_use(*arguments())
    assert (used.forward, used.backward) == ("torch", "torch")
    assert "no CUDA device" in kernels_in_use(*arguments(), backend="triton").why_backward


def test_what_the_op_rejects_is_rejected_here() -> None:
    q, k, v, layout = arguments()
    with pytest.raises(ValueError, match="layout is too small"):
        kernels_in_use(q, k, v, layout, query_offset=64)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "portable"])
def test_both_sets_of_kernels_are_as_exact_as_torch_on_a_gpu(backend: str, device: torch.device) -> None:
    problem = Problem(heads=8, kv_heads=2, s_q=1000, s_k=1000, dim=128, block=128, dtype=torch.bfloat16, keep=0.3)
    assert_as_exact_as_torch(problem, backend, device)
