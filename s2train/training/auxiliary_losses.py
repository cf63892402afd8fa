"""Sets the scale of auxiliary losses, and combines their values across ranks.

The scale is that of their gradients, set before a step. Their values are combined after it.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from megatron.core import parallel_state

from s2train.attention.hybrid import HybridLayout
from s2train.config import PretrainConfig
from s2train.megatron.core_attention import cores_of
from s2train.training.batches import EarlyBatches

SEPARATOR = "/"  # between a column's name and the layer's number


class AuxiliaryLosses:
    """Collects what the layers' kinds of attention record in each step.

    Does nothing if no kind has columns.

    Args:
        chunks: of this rank.
        loss_scale: scales the language model's loss; None: it isn't scaled.
    """

    def __init__(
        self,
        cfg: PretrainConfig,
        hybrid: HybridLayout,
        chunks: Sequence[torch.nn.Module],
        loss_scale: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self._columns = [
            (number, layer.kind.name, name)
            for number, layer in enumerate(hybrid.layers)
            for name in layer.kind.columns()
        ]
        self._cores = cores_of(*chunks)
        self._tp, self._scale = cfg.parallel.tp, 1.0
        if loss_scale is not None and self._columns:  # read once: a read waits, and only fp16 changes it
            self._scale = float(loss_scale(torch.ones(1, device=torch.cuda.current_device())))
        self._has_losses = any(
            weight is not None for layer in hybrid.layers for weight in layer.kind.columns().values()
        )
        self._samples = cfg.train.micro_batch_size * parallel_state.get_data_parallel_world_size()
        self._seq_length = cfg.train.seq_length

    def early_batches(self, batch: int) -> int:
        """Return how many of a step's micro batches to fetch before it.

        They are all of this rank's, if there are auxiliary losses: their scale depends on which tokens count.

        Args:
            batch: the step's global batch size.
        """
        return batch // self._samples if self._has_losses else 1

    def begin_step(self, step: int, is_logged: bool, batch: int, batches: EarlyBatches) -> None:
        """Prepare the layers for a training step; collective.

        Gradients are scaled as the language model's loss is: it is a mean over the tokens of a micro batch, divided by
        the number of micro batches, and averaged over data parallel ranks with the gradients. Megatron's schedules do
        this only for the losses of its layers. `take_step` then divides all gradients by the share of tokens that count
        in the language model's loss. Auxiliary losses are means over all tokens, and are multiplied by the share first.

        Args:
            step: counted from 1.
            is_logged: whether the run logs after the step.
            batch: the step's global batch size.
            batches: of this rank, the step's next.
        """
        scale: float | torch.Tensor = self._scale / (batch // self._samples)
        if self._has_losses:
            scale = scale * self._counted_share(batch, batches)
        for core in self._cores:
            core.step, core.loss_scale, core.is_logged = step, scale, is_logged
            core.records.take()

    def _counted_share(self, batch: int, batches: EarlyBatches) -> torch.Tensor:
        """Return the share of the step's tokens that count.

        They count in the language model's loss. Float64 [].
        """
        tokens = batches.counted_tokens(self.early_batches(batch))
        torch.distributed.all_reduce(tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return tokens / (batch * self._seq_length)

    def take(self) -> torch.Tensor:
        """Sum and count of each column's values in this step.

        Collective: over micro batches and all ranks. Does not wait for the GPU.

        Returns:
            Float64 [2 × columns]: a sum and its count in turn.
        """
        table = torch.zeros(len(self._columns), 2, dtype=torch.float64, device=torch.cuda.current_device())
        if not self._columns:
            return table.flatten()
        place = {(number, name): row for row, (number, _, name) in enumerate(self._columns)}
        for core in self._cores:
            for name, (total, count) in core.records.take().items():
                row = place[core.layer_number - 1, name]
                table[row, 0] += total.double()
                table[row, 1] += count
        torch.distributed.all_reduce(table)
        return table.flatten()

    def means(self, taken: Sequence[float]) -> dict[str, float]:
        """Values by `KIND_NAME/LAYER`, of what `take` returned.

        A value is summed over tensor parallel ranks, which record parts of it, and averaged over micro batches and
        data and context parallel ranks.
        """
        return {
            f"{kind}_{name}{SEPARATOR}{number}": total * self._tp / count
            for (number, kind, name), total, count in zip(self._columns, taken[::2], taken[1::2], strict=True)
            if count
        }


def column_means(values: Mapping[str, float]) -> dict[str, float]:
    """Return the mean over layers of each column."""
    columns: dict[str, list[float]] = {}
    for key, value in values.items():
        columns.setdefault(key.rpartition(SEPARATOR)[0], []).append(value)
    return {name: sum(of_layers) / len(of_layers) for name, of_layers in columns.items()}


def layer_values(values: Mapping[str, float], column: str) -> list[tuple[int, float]]:
    """List number and value of each layer that has a column."""
    prefix = column + SEPARATOR
    return [(int(key.removeprefix(prefix)), value) for key, value in values.items() if key.startswith(prefix)]
