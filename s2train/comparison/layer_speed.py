"""Checks and times one layer's core attention, as training calls it."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from s2train.attention.kind import LayerLayout
from s2train.config import PretrainConfig
from s2train.kernels.attention import Backend
from s2train.kernels.benchmarks.correctness import sample, whole_problem
from s2train.kernels.benchmarks.timing import Clock, time_passes
from s2train.kernels.dense import dense_causal_attention, torch_unsupported_reason
from s2train.kernels.flash4 import fa4_problem, fa4_unsupported_reason
from s2train.kernels.layout import BlockLayout
from s2train.kernels.layout_builder import ColumnRule
from s2train.kernels.relative_error import relative_error
from s2train.layouts.patterns.base import ones
from s2train.megatron.block_attention import DenseCoreAttention, kernels_of
from s2train.megatron.core_attention import CausalCoreAttention
from s2train.megatron.dense_kernels import CallInputs
from s2train.megatron.layout_cache import LayoutCache
from s2train.megatron.model import transformer_config
from s2train.megatron.specs import core_attention_class

Record = dict[str, Any]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
_BLOCK = 64  # of the layout by which the oracle computes dense attention


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model's attention."""

    heads: int
    kv_heads: int
    dim: int  # of a head

    def inputs(self, length: int, device: torch.device) -> Inputs:
        """Draw q, k and v, which want gradients, and the output's gradient.

        They are normal, bfloat16 [length, 1, heads, dim].
        """

        def draw(heads: int) -> Tensor:
            return torch.randn(length, 1, heads, self.dim, dtype=torch.bfloat16, device=device)

        q, k, v = (draw(heads).requires_grad_() for heads in (self.heads, self.kv_heads, self.kv_heads))
        return q, k, v, draw(self.heads)


class LayerTimer:
    """Times attention of one model's sizes.

    All layers and implementations have the same inputs at a length.

    Args:
        cfg: the run's settings; their layout does not matter.
        check_length: tokens of the sequence that is compared with the oracle.
        budget_ms: of device time for each measurement.
    """

    def __init__(
        self, cfg: PretrainConfig, sizes: Sizes, device: torch.device, check_length: int, budget_ms: float
    ) -> None:
        self.sizes, self.device, self.check_length, self.budget_ms = sizes, device, check_length, budget_ms
        self._cfg, self._config = cfg, transformer_config(cfg)
        self._clock = Clock(device)
        self._inputs: tuple[int, Inputs] | None = None
        self._short = sizes.inputs(check_length, device)
        self._checks: dict[str, Record] = {}

    def key(self, layer: LayerLayout, layout: BlockLayout) -> str:
        """Name what a layer computes: its core attention and kept blocks."""
        digest = hashlib.blake2b(layer.kind.core_attention.encode(), digest_size=8)
        digest.update(f"{layout.block_size} {layout.num_heads} {layout.num_query_blocks}".encode())
        for tensor in (layout.pattern_of_head, layout.row_offsets, layout.row_columns):
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def layout(self, layer: LayerLayout, length: int, cache: LayoutCache) -> BlockLayout:
        """Return the layer's layout, which its core attention finds in `cache`."""
        return cache.get(layer, length, (0, self.sizes.heads), self.device)

    def core(self, layer: LayerLayout, cache: LayoutCache) -> CausalCoreAttention:
        """Build the layer's core attention as the model has it."""
        core = core_attention_class(layer.kind)(
            self._config, 1, AttnMaskType.causal, "self", layer_layout=layer, num_query_groups=self.sizes.kv_heads,
            cache=cache, backend=cast(Backend, self._cfg.attention_backend), seed=self._cfg.seed,
        )  # fmt: skip
        if isinstance(core, DenseCoreAttention):
            core.implementation = self._cfg.dense_attention
        return core

    def time_layer(self, layer: LayerLayout, length: int, cache: LayoutCache) -> Record:
        """Check a layer over `check_length` tokens, then time it over `length`.

        Returns the check, and if it is passed, times in ms and kernels.
        """
        core, checked = self.core(layer, cache), self.core(layer, cache)
        if (
            isinstance(core, DenseCoreAttention)
            and isinstance(checked, DenseCoreAttention)
            and self.device.type == "cuda"
        ):
            q, k, v, _ = self._inputs_of(length)
            checked.implementation = core.choose(CallInputs(q, k, v)).implementation  # it depends on the length
        short = self.layout(layer, self.check_length, cache)
        key = " ".join([self.key(layer, short), getattr(checked, "implementation", "")])
        record = self._checked(key, partial(_attend, checked), short)
        if not record["check"]["wrong"]:
            record |= self._timed(partial(_attend, core), length) | {"kernels": kernels_of([core])}
        return record

    def time_dense(self, implementation: str, length: int) -> Record:
        """Check one implementation of dense attention and time it, as `time_layer`."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scale = self.sizes.dim**-0.5
            return dense_causal_attention(q, k, v, softmax_scale=scale, implementation=implementation)

        blocks = -(-self.check_length // _BLOCK)
        everything = BlockLayout.from_rule(
            [ColumnRule(1, ones)], [0] * self.sizes.heads, _BLOCK, blocks, blocks, device=self.device
        )
        record = self._checked(implementation, attend, everything)
        return record if record["check"]["wrong"] else record | self._timed(attend, length)

    def absent(self, implementation: str) -> str | None:
        """Return why an implementation of dense attention can't run here, or None."""
        if implementation == "auto":
            return None
        if implementation != "fa4":
            return torch_unsupported_reason(implementation, *self._short[:3])
        capability = torch.cuda.get_device_capability(self.device)
        return fa4_problem() or fa4_unsupported_reason(capability, torch.bfloat16, self.sizes.dim)

    def _checked(self, key: str, attend: Attention, layout: BlockLayout) -> Record:
        """Compare outputs and gradients with float64; each key once."""
        if key not in self._checks:
            exact, limits = whole_problem(self._short, layout)
            *leaves, upstream = self._short
            out = attend(*self._short[:3])
            dq, dk, dv = torch.autograd.grad(out, leaves, upstream)
            everything = torch.arange(self.check_length, device=self.device)
            found = sample(out, (dq, dk, dv), "sbhd", everything, everything)
            errors = {name: relative_error(found[name], exact[name]) for name in exact}
            wrong = [name for name, error in errors.items() if not error <= limits[name]]
            self._checks[key] = {"length": self.check_length, "errors": errors, "limits": limits, "wrong": wrong}
        return {"check": self._checks[key]}

    def _timed(self, attend: Attention, length: int) -> Record:
        """Time forward and backward.

        A pass before compiles the kernels and builds the schedules that the layout caches.
        """
        q, k, v, upstream = self._inputs_of(length)

        def backward(out: Tensor) -> object:
            return torch.autograd.grad(out, (q, k, v), upstream)

        backward(attend(q, k, v))
        return time_passes(lambda: attend(q, k, v), backward, self._clock, self.budget_ms)

    def _inputs_of(self, length: int) -> Inputs:
        """Return the inputs of a length; only the last length's are kept."""
        if self._inputs is None or self._inputs[0] != length:
            self._inputs = None  # frees those of another length first
            self._inputs = length, self.sizes.inputs(length, self.device)
        return self._inputs[1]


def _attend(core: CausalCoreAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = core(q, k, v, None)
    return out.view_as(q)
