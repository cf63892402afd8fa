"""Divide layers over pipeline stages and estimate how long stages wait."""

from dataclasses import dataclass
from itertools import accumulate

from s2train.attention.hybrid import HybridLayout
from s2train.attention.kind import LayerLayout
from s2train.config import ModelConfig, ParallelConfig
from s2train.costs.attention import attention_flops
from s2train.costs.parameters import attention_shape, layer_parameters


@dataclass(frozen=True)
class LayerFlops:
    """Forward FLOPs of one sequence per layer and in the LM head.

    The backward pass takes twice that.
    """

    layers: tuple[float, ...]
    head: int


def layer_flops(model: ModelConfig, hybrid: HybridLayout, seq_length: int) -> LayerFlops:
    """Count each layer's FLOPs: kept positions, and what the kind adds.

    A dense layer costs what its dense attention does.
    """
    shape = attention_shape(model)
    of_layer = {
        layer: 2 * seq_length * layer_parameters(model, layer).matmul
        + attention_flops(layer, seq_length, shape.head_dim)
        + layer.kind.extra_flops(layer, seq_length, shape)
        for layer in set(hybrid.layers)
    }
    return LayerFlops(
        tuple(of_layer[layer] for layer in hybrid.layers),
        head=2 * seq_length * model.hidden_size * model.vocab_size,
    )


@dataclass(frozen=True)
class Stages:
    """Layers in each model chunk.

    Chunk c lies on pipeline rank c mod `pp`. Chunks are in the model's order.
    """

    chunks: tuple[int, ...]
    pp: int

    def of_rank(self, rank: int) -> tuple[int, ...]:
        """Return the number of layers in each chunk of pipeline rank `rank`."""
        return self.chunks[rank :: self.pp]

    def layers_of_rank(self, hybrid: HybridLayout, rank: int) -> tuple[tuple[LayerLayout, ...], ...]:
        """Return the layers in each chunk of pipeline rank `rank`."""
        ends = list(accumulate(self.chunks))
        chunks = [hybrid.layers[end - size : end] for end, size in zip(ends, self.chunks, strict=True)]
        return tuple(chunks[rank :: self.pp])

    def megatron_layout(self) -> str:
        """Format as Megatron's `pipeline_model_parallel_layout`, such as Ett|ttt|ttL."""
        parts = ["t" * layers for layers in self.chunks]
        return "|".join(["E" + parts[0], *parts[1:]]) + "L" if len(parts) > 1 else f"E{parts[0]}L"


def pipeline_stages(model: ModelConfig, parallel: ParallelConfig, costs: LayerFlops) -> Stages:
    """Divide layers as `parallel.pipeline_split` says: equal numbers, or equal work.

    `model` and `parallel` must have passed `check_division`.
    """
    number = parallel.pp * (parallel.vpp or 1)
    if parallel.pipeline_split == "even":
        return Stages((model.num_layers // number,) * number, parallel.pp)
    return Stages(_least_largest_part(costs, number), parallel.pp)


def _least_largest_part(costs: LayerFlops, number: int) -> tuple[int, ...]:
    """Divide layers into `number` runs so that the most expensive costs least.

    Returns the runs' sizes; among equals, the most similar ones.
    """
    work = [*costs.layers[:-1], costs.layers[-1] + costs.head]
    sums = [0, *accumulate(work)]
    # best[end]: (most expensive run, sum of squares, sizes) of the first `end` layers in the runs so far
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0, 0, ())}
    for run in range(1, number + 1):
        following = {}
        for end in range(run, len(work) - (number - run) + 1):
            options = []
            for start, (dearest, squares, sizes) in best.items():
                if start < end:
                    cost = sums[end] - sums[start]
                    options.append((max(dearest, cost), squares + cost**2, (*sizes, end - start)))
            following[end] = min(options)
        best = following
    return best[len(work)][2]


@dataclass(frozen=True)
class Balance:
    """Balance of work over pipeline ranks, and their share of idle time.

    Attributes:
        imbalance: the busiest rank's work over the mean, minus 1.
        idle: 1 - work / (ranks × time) of Megatron's 1F1B pipeline schedules without communication. m micro batches
            take m t_max + (Σt - t_max) / vpp, where t is the time of one on each rank.
    """

    stages: Stages
    imbalance: float
    idle: float


def balance(stages: Stages, costs: LayerFlops, num_micro_batches: int) -> Balance:
    """Compute how evenly stages share the work, and how long they wait.

    Stages wait at the beginning and end of a step.
    """
    sums = [0, *accumulate(costs.layers)]
    ends = list(accumulate(stages.chunks))
    chunks = [sums[end] - sums[end - layers] for end, layers in zip(ends, stages.chunks, strict=True)]
    chunks[-1] += costs.head
    ranks = [sum(chunks[rank :: stages.pp]) for rank in range(stages.pp)]
    whole, largest = sum(ranks), max(ranks)
    virtual = len(chunks) // stages.pp
    time = num_micro_batches * largest + (whole - largest) / virtual
    return Balance(
        stages, imbalance=largest * stages.pp / whole - 1, idle=1 - num_micro_batches * whole / (stages.pp * time)
    )
