"""Sums effects of blocks and rules over samples, for this rank's heads."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from s2train.kernels.attention import Backend
from s2train.kernels.block_statistics import block_effects, output_delta, rule_effects
from s2train.semsa.core_attention import Attended, StudiedCoreAttention
from s2train.semsa.rules import Rule, rule_masks


class Accumulator:
    """An observer of attention layers that sums what their backward passes meet.

    Args:
        layers: of this rank, all of the model's.
        rules: whose effects to sum; none: of blocks only.
        columns: int64 [layers, heads, n], as in `Profile`.
        num_blocks: of a sequence.
    """

    def __init__(
        self,
        layers: Sequence[StudiedCoreAttention],
        rules: Sequence[Rule],
        columns: np.ndarray | None,
        num_blocks: int,
        backend: Backend,
    ) -> None:
        self.layers, self.rules, self.columns, self.backend = layers, rules, columns, backend
        self.num_blocks = num_blocks
        self._masks: dict[int, Tensor] = {}
        self.clear()
        for core in layers:
            core.observer = self

    def clear(self) -> None:
        """Forget all sums."""
        self.blocks: list[Tensor | None] = [None] * len(self.layers)
        self.of_rules: list[Tensor | None] = [None] * len(self.layers)

    def __call__(self, core: StudiedCoreAttention, attended: Attended) -> None:
        number, block_size = core.layer_number - 1, core.layer_layout.block_size
        tensors = (attended.q, attended.k, attended.v, attended.lse, attended.dout)
        delta = output_delta(attended.out, attended.dout)
        scale = core.softmax_scale
        self.blocks[number] = block_effects(
            *tensors, delta, block_size=block_size, softmax_scale=scale, out=self.blocks[number], backend=self.backend
        )
        if self.rules:
            masks = self._masks_of(number, core, attended.q.device)
            self.of_rules[number] = rule_effects(
                *tensors, delta, masks, block_size=block_size, softmax_scale=scale, out=self.of_rules[number],
                backend=self.backend,
            )  # fmt: skip

    def _masks_of(self, number: int, core: StudiedCoreAttention, device: torch.device) -> Tensor:
        key = number if self.columns is not None else 0  # without columns, layers have the same rules
        if key not in self._masks:
            columns = None if self.columns is None else self.columns[number]
            self._masks[key] = rule_masks(
                self.rules,
                range(*core.heads),
                core.shape.num_heads // core.shape.num_query_groups,
                columns,
                self.num_blocks,
            ).to(device)
        return self._masks[key]

    def sums(self, data_group: torch.distributed.ProcessGroup) -> tuple[np.ndarray, np.ndarray]:
        """Return the sums over all ranks, on every rank; collective.

        They are float32, of blocks [4, layers, heads, n, n] and of rules [4, layers, heads, rules, n]. Every rank must
        have observed a sample, or no rank.
        """
        gathered = []
        for own in (self.blocks, self.of_rules):
            if any(part is None for part in own):
                gathered.append(np.zeros(0, dtype=np.float32))
                continue
            layers = []  # one at a time: all of them in float64 would take several times the sums' memory
            for part in own:
                assert part is not None
                total = part[:, None].double()
                torch.distributed.all_reduce(total, group=data_group)
                layers.append(gather_heads(total, self.layers[0].tp_group).float().cpu())
            gathered.append(torch.cat(layers, 1).numpy())
        return gathered[0], gathered[1]


def gather_heads(own: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Concatenate the heads of all tensor parallel ranks; collective.

    `own` and the result are [4, layers, heads, …].
    """
    parts = [torch.empty_like(own) for _ in range(group.size())]
    torch.distributed.all_gather(parts, own.contiguous(), group=group)
    return torch.cat(parts, 2)
