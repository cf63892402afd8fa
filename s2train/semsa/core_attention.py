"""Core attention that is observed while it computes, or masked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2train.attention.dense import DenseKind, DenseSettings
from s2train.attention.hybrid import HybridLayout
from s2train.attention.kind import LayerLayout
from s2train.config import ModelConfig, ScheduleConfig
from s2train.kernels.layout import BlockLayout
from s2train.layouts.patterns import Dense, Pattern
from s2train.layouts.schedules import find_schedule
from s2train.megatron.block_attention import SparseCoreAttention


@dataclass(frozen=True)
class Attended:
    """Tensors of one attention call after its backward pass.

    They are [s, b, h, d] unless noted, and have no gradients.

    Attributes:
        lse: log-sum-exp, float32 [b, h, s].
        dout: gradient of the loss with respect to `out`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    dout: Tensor


Observer = Callable[["StudiedCoreAttention", Attended], None]


class StudiedCoreAttention(SparseCoreAttention):
    """Dense attention for an observer, or attention under a mask.

    The observer gets the tensors of each backward pass.

    Attributes:
        observer: called in each backward pass; None: nobody observes.
        mask: of this rank's heads; None: all blocks.
    """

    observer: Observer | None = None
    mask: BlockLayout | None = None

    def layout(self, seq_length: int, device: torch.device) -> BlockLayout:
        return super().layout(seq_length, device) if self.mask is None else self.mask

    def attend(self, query: Tensor, key: Tensor, value: Tensor, query_offset: int) -> Tensor:
        observer = self.observer
        if observer is None or not torch.is_grad_enabled() or not query.requires_grad:
            return super().attend(query, key, value, query_offset)
        layout = self.layout(key.shape[0], query.device)
        out, lse = self.attend_by_layout(query, key, value, layout, query_offset, return_lse=True)
        q, k, v, o, log = (x.detach() for x in (query, key, value, out, lse))
        out.register_hook(lambda dout: observer(self, Attended(q, k, v, o, log, dout.to(o.dtype).contiguous())))
        return out


class StudiedKind(DenseKind):
    """Dense attention by `StudiedCoreAttention`; never of a run."""

    name = "studied"
    core_attention = "s2train.semsa.core_attention:StudiedCoreAttention"


def studied_layout(model: ModelConfig, block_size: int) -> HybridLayout:
    """Return a layout in which every layer is observed, and keeps everything."""
    kind = StudiedKind("D", DenseSettings(), "layout.layers")
    layer = LayerLayout(kind, (Dense(),) * model.num_attention_heads, block_size)
    return HybridLayout(
        (layer,) * model.num_layers, block_size, model.num_query_groups, find_schedule(ScheduleConfig())
    )


def studied_layers(model: torch.nn.Module) -> list[StudiedCoreAttention]:
    """Return a model's attention layers, first to last."""
    return [module for module in model.modules() if isinstance(module, StudiedCoreAttention)]


def set_patterns(model: torch.nn.Module, layers: Sequence[Sequence[Pattern]] | None, seq_length: int) -> None:
    """Mask every head of every layer by its pattern; None: by nothing."""
    for number, core in enumerate(studied_layers(model)):
        if layers is None:
            core.mask = None
            continue
        own, device = core.layer_layout, next(model.parameters()).device
        layer = LayerLayout(own.kind, tuple(layers[number]), own.block_size)
        core.mask = layer.block_layout(seq_length, heads=slice(*core.heads), device=device)
