"""Arguments that can't work are rejected with what to change."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from s2train.kernels import Backend, BlockLayout, block_sparse_attention, resolve_backend
from s2train.kernels import arguments as module
from s2train.kernels.tiles import check_launch

from tests.kernels.cases import Problem

HEADS, LENGTH, DIM = 4, 60, 16


def arguments(**changes: Any) -> dict[str, Any]:
    tensors = {name: torch.randn(LENGTH, 1, HEADS, DIM) for name in ("q", "k", "v")}
    layout = BlockLayout.from_mask(torch.ones(HEADS, 4, 4, dtype=torch.bool), 16)
    return tensors | {"layout": layout} | changes


REFUSED = {
    "three dimensions": ({"q": torch.randn(LENGTH, HEADS, DIM)}, "q must have the four dimensions"),
    "dtypes": ({"k": torch.randn(LENGTH, 1, HEADS, DIM).half()}, "cast them to one dtype"),
    "integers": ({n: torch.ones(LENGTH, 1, HEADS, DIM, dtype=torch.int) for n in "qkv"}, "floating point"),
    "devices": ({"v": torch.randn(LENGTH, 1, HEADS, DIM, device="meta")}, "move them to one device"),
    "k and v": ({"v": torch.randn(LENGTH - 1, 1, HEADS, DIM)}, "shapes don't match"),
    "head dimension": ({"q": torch.randn(LENGTH, 1, HEADS, 2 * DIM)}, "shapes don't match"),
    "kv heads": ({n: torch.randn(LENGTH, 1, 3, DIM) for n in "kv"}, "not a multiple of the 3 KV heads"),
    "layout heads": ({"q": torch.randn(LENGTH, 1, 8, DIM)}, "slice it with layout.heads"),
    "short layout": ({"query_offset": 16}, "layout is too small.*at least 5 x 4 blocks"),
    "negative offset": ({"query_offset": -1}, "query_offset"),
    "scale": ({"softmax_scale": 0.0}, "softmax_scale"),
    "format": ({"format": "hsbd"}, "format must be one of"),
    "backend": ({"backend": "flash"}, "backend must be"),
    "documents beyond the rows": ({"cu_seqlens": torch.tensor([0, 61])}, "ascend from 0 to the 60 rows"),
    "documents that descend": ({"cu_seqlens": torch.tensor([0, 40, 20, 60])}, "ascend"),
    "float documents": ({"cu_seqlens": torch.tensor([0.0, 60.0])}, "int32"),
    "documents and offset": ({"cu_seqlens": torch.tensor([0, 60]), "query_offset": 1}, "pack all documents"),
}


def test_the_arguments_that_the_rejected_ones_change_are_fine() -> None:
    assert block_sparse_attention(**arguments()).shape == (LENGTH, 1, HEADS, DIM)


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**arguments(**changes))


def test_auto_is_torch_on_a_cpu_and_triton_on_cuda() -> None:
    assert resolve_backend("auto", "cpu") == "torch"
    assert resolve_backend("auto", "cuda") == "triton"
    assert resolve_backend("torch", torch.device("cuda:1")) == "torch"


@pytest.mark.parametrize("backend", ["triton", "portable"])
def test_triton_on_a_cpu_needs_the_interpreter(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        resolve_backend(backend, "cpu")


def test_layers_check_the_documents_they_share_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checks, check = [], module.check_documents

    def counted(bounds: torch.Tensor, *others: Any) -> None:
        checks.append(bounds)
        check(bounds, *others)

    monkeypatch.setattr(module, "check_documents", counted)
    bounds = torch.tensor([0, 20, LENGTH])
    call = arguments(cu_seqlens=bounds)
    for _ in range(3):
        block_sparse_attention(**call)
    block_sparse_attention(**call | {"cu_seqlens": bounds.clone()})
    assert len(checks) == 2
    bounds[1] = LENGTH + 1
    with pytest.raises(ValueError, match="ascend"):
        block_sparse_attention(**call)


@pytest.mark.parametrize("backend", ["triton", "portable"])
def test_triton_rejects_float64(backend: Backend) -> None:
    double = {n: torch.randn(LENGTH, 1, HEADS, DIM, dtype=torch.float64) for n in "qkv"}
    with pytest.raises(ValueError, match=r"float64.*cast"):
        block_sparse_attention(**arguments(**double, backend=backend))


def test_a_cpu_process_that_uses_torch_never_imports_the_kernels() -> None:
    code = (
        "import sys, torch; from s2train.kernels import Backend, BlockLayout, block_sparse_attention as f\n"
        "x = torch.randn(16, 1, 1, 16); f(x, x, x, BlockLayout.from_mask(torch.ones(1, 1, 1) > 0, 16))\n"
        "sys.exit('s2train.kernels.forward' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_launches_beyond_32_bits_are_rejected() -> None:
    check_launch(2**31 - 1, 2**28, 4)
    with pytest.raises(ValueError, match="split the batch"):
        check_launch(2**31, 1, 1)
    with pytest.raises(ValueError, match="share patterns"):
        check_launch(1, 2**28, 8)


def test_a_layout_for_another_batch_is_rejected() -> None:
    (q, k, v), layout, _, _ = Problem(batch=2, s_q=40, s_k=40, layout="static batch").make(torch.device("cpu"))
    block_sparse_attention(q, k, v, layout)
    with pytest.raises(ValueError, match="for 2 sequences but q has 1"):
        block_sparse_attention(q[:, :1], k[:, :1], v[:, :1], layout)
