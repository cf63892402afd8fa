"""Chooses and runs the kernels of a dense layer's call."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from s2train.kernels.attention import Backend, block_sparse_attention
from s2train.kernels.dense import dense_causal_attention, torch_unsupported_reason
from s2train.kernels.dense_choice import DenseCall, DenseChoice, Kind, choose_dense
from s2train.kernels.dispatch import kernels_in_use
from s2train.kernels.flash4 import fa4_attention
from s2train.kernels.layout import BlockLayout


@dataclass(frozen=True)
class CallInputs:
    """Tensors of a layer's call.

    The last query is at the last key.

    Attributes:
        query: [s_q, b, h, d].
        key, value: [s_k, b, h_kv, d], from position 0 on.
        bounds: int32 [documents + 1], of packed documents; None: they are not packed.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bounds: torch.Tensor | None = None

    @property
    def query_offset(self) -> int:
        """Position of the first query."""
        return len(self.key) - len(self.query)

    @property
    def kind(self) -> Kind:
        if self.bounds is not None:
            return "documents"
        return "later" if self.query_offset else "whole"


def choose_kernels(
    inputs: CallInputs, implementation: str, backend: Backend, full_layout: Callable[[], BlockLayout]
) -> DenseChoice:
    """Choose the kernels of a dense layer's call.

    Args:
        implementation: the run's `dense_attention`.
        backend: of the sparse op.
        full_layout: makes the layout that keeps every block, which the sparse op needs.

    Raises:
        ValueError: the requested implementation can't run the call, or none can.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    deterministic = torch.are_deterministic_algorithms_enabled()
    call = DenseCall(
        inputs.kind,
        query.dtype,
        query.shape[-1],
        query.shape[2] != key.shape[2],
        deterministic,
        torch.cuda.get_device_capability(query.device) if query.is_cuda else None,
        key.shape[0],
    )

    def serves(name: str) -> str | None:
        if name != "s2train":
            return torch_unsupported_reason(name, query, key, value)
        layout = full_layout()
        used = kernels_in_use(
            query, key, value, layout, query_offset=inputs.query_offset, cu_seqlens=inputs.bounds, backend=backend
        )
        # portable kernels are slower than torch's, except for a deterministic backward; torch takes no documents
        fast = used.forward == "hopper" and (used.backward == "hopper" or deterministic)
        return None if fast or inputs.kind == "documents" or implementation == name else str(used)

    return choose_dense(call, implementation, serves)


def runs_sparse_op(implementation: str, bounds: torch.Tensor | None) -> bool:
    """Return whether the sparse op runs.

    It does by name, and for documents unless FlashAttention-4 does.
    """
    return implementation == "s2train" or (bounds is not None and implementation != "fa4")


def run_dense(
    inputs: CallInputs, implementation: str, full_layout: BlockLayout | None, softmax_scale: float, backend: Backend
) -> torch.Tensor:
    """Compute a dense layer's call by the kernels that `choose_kernels` chose.

    Args:
        implementation: the choice's; "auto" on a CPU.
        full_layout: keeps every block; None where `runs_sparse_op` is false.
        backend: of the sparse op.
    """
    query, key, value, bounds = inputs.query, inputs.key, inputs.value, inputs.bounds
    if runs_sparse_op(implementation, bounds):
        assert full_layout is not None
        return block_sparse_attention(
            query, key, value, full_layout, softmax_scale=softmax_scale, query_offset=inputs.query_offset,
            cu_seqlens=bounds, backend=backend,
        )  # fmt: skip
    if bounds is not None:
        deterministic = torch.are_deterministic_algorithms_enabled()
        return fa4_attention(query, key, value, softmax_scale=softmax_scale, bounds=bounds, deterministic=deterministic)
    return dense_causal_attention(
        query, key, value, softmax_scale=softmax_scale, query_offset=inputs.query_offset, implementation=implementation
    )
