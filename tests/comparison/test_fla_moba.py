"""flash-linear-attention's MoBA is called as its documentation says; it is not installed here."""

import sys
from types import ModuleType

import pytest
import torch
from s2train.kernels.dense import dense_causal_attention
from torch import Tensor

from s2train.comparison.fla_moba import fla_moba, fla_problem


def test_a_missing_library_is_named() -> None:
    assert fla_problem() == "not importable: fla, flash_attn"


def test_heads_of_a_group_read_the_same_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def parallel_moba(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, block: int, blocks: int) -> Tensor:
        calls.append((q.shape, k.shape, v.shape, bounds.tolist(), longest, block, blocks))
        out = dense_causal_attention(*(x.transpose(0, 1) for x in (q, k, v)), softmax_scale=q.shape[-1] ** -0.5)
        return out.transpose(0, 1)

    module = ModuleType("fla.ops.moba.parallel")
    module.parallel_moba = parallel_moba  # type: ignore[attr-defined]
    for name in ("fla", "fla.ops", "fla.ops.moba"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    query, key, value = (torch.randn(12, 1, heads, 16) for heads in (4, 2, 2))
    out = fla_moba(query, key, value, 4, 3)
    torch.testing.assert_close(out, dense_causal_attention(query, key, value, softmax_scale=0.25))
    assert calls == [((1, 12, 4, 16),) * 3 + ([0, 12], 12, 4, 3)]
