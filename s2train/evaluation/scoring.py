"""Computes a checkpoint's losses on windows of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from s2train.evaluation.windows import Window
from s2train.inference.cached_model import CachedModel, uncached_losses
from s2train.inference.kv_cache import kv_cache
from s2train.megatron.core_attention import cores_of


@dataclass(frozen=True)
class Scorer:
    """A loaded model.

    Windows go over the KV cache in chunks, unless a layer's attention over a cache is not that of training.

    Attributes:
        chunk: tokens of a sequence that go through the model at once.
    """

    gpt: GPTModel
    device: torch.device
    chunk: int

    def __call__(self, windows: Sequence[Window]) -> tuple[Tensor, Tensor, Tensor]:
        """Score windows together; collective over a tensor parallel group.

        Returns:
            Of n tokens of the longest window: losses in nats, float32 [b, n]; whether a target is the likeliest token,
            bool [b, n]; and whether it is counted, bool [b, n].
        """
        longest = max(len(window.tokens) for window in windows)
        both = np.zeros((2, len(windows), longest), dtype=np.int64)
        counted = torch.zeros(len(windows), longest, dtype=torch.bool)
        for row, window in enumerate(windows):
            size = len(window.tokens)
            both[0, row, :size], both[1, row, :size] = window.tokens, window.targets
            counted[row, window.first : size] = True
        tokens, targets = torch.from_numpy(both).to(self.device)
        lengths = torch.tensor([len(window.tokens) for window in windows])
        if self._decodes_as_trained:
            with kv_cache(self.gpt, len(windows), longest) as cache:
                losses, likeliest = CachedModel(self.gpt, cache).losses(tokens, targets, lengths, self.chunk)
        else:
            losses, likeliest = uncached_losses(self.gpt, tokens, targets)
        return losses, likeliest, counted.to(self.device)

    @cached_property
    def _decodes_as_trained(self) -> bool:
        return all(core.layer_layout.kind.decodes_as_trained for core in cores_of(self.gpt))
