"""The part of block-selecting core attention that caches and losses use."""

from collections.abc import Sequence

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from s2train.attention.block_selection import BlockSelectionKind
from s2train.attention.selection.lists import row_chunks, select
from s2train.megatron.core_attention import CausalCoreAttention


class SelectingCoreAttention(CausalCoreAttention):
    """Core attention with a scorer, which selects key blocks.

    Attributes:
        taught: the target that the teacher's same layer computed of the current micro batch, in place of this layer's
            own; it stays for a recomputed forward pass.
    """

    taught: Tensor | None = None

    @property
    def params_dtype(self) -> torch.dtype:
        """Dtype of the model's weights, queries and keys."""
        config = self.config
        assert isinstance(config, TransformerConfig)
        return config.params_dtype

    @property
    def kind(self) -> BlockSelectionKind:
        kind = self.layer_layout.kind
        assert isinstance(kind, BlockSelectionKind)
        return kind

    @property
    def learns(self) -> bool:
        """Return whether this pass gives the scorer gradients."""
        return torch.is_grad_enabled() and bool(self.kind.scorer.losses)

    def taught_target(self) -> Tensor | None:
        """Return the target from the teacher; None without a teacher."""
        if self.kind.teacher is None:
            return None
        if self.taught is None:
            raise RuntimeError(f"{self.kind.setting}.teacher={self.kind.teacher}: the teacher must run before this")
        return self.taught

    @torch.no_grad()
    def lists(
        self, block_queries: Tensor, features: Tensor, first: int, end: int, scores: Tensor | None = None
    ) -> Tensor:
        """Select key blocks for query blocks [first, end).

        The result is int32 [b, h_kv, end - first, slots].

        Args:
            block_queries, features: those of the whole sequence.
            scores: of these rows, from the scorer's `head_scores`; None: computed for a chunk of rows at a time.
        """
        scorer, budget, count = self.kind.scorer, self.kind.budget, features.shape[1]
        rows = torch.arange(count, device=features.device)[None, None]
        candidates, slots, lists = budget.candidates(rows, count), budget.most_chosen(count), []
        for start, stop in row_chunks(first, end):
            if scores is None:
                around = slice(max(0, start - scorer.earlier_rows), stop)
                found = scorer.head_scores(
                    block_queries[:, around], features[:, :stop], candidates[:, :, around, :stop], self.weight
                )[..., start - around.start :, :]
            else:
                found = scores[..., start - first : stop - first, :stop]
            own = rows[..., start:stop]
            lists.append(select(found, own, budget, slots, normalize=scorer.normalizes, backend=self.backend))
        return joined(lists, 2)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate tensors; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
