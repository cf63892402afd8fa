"""The shape of a layer's attention, and weights that a kind adds."""

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one layer's attention, not divided over ranks."""

    hidden_size: int
    num_heads: int  # query heads
    num_query_groups: int  # KV heads
    head_dim: int


def kv_heads_on_rank(num_query_groups: int, tp: int) -> int:
    """Return how many KV heads each tensor parallel rank computes with.

    With more ranks than KV heads, tp / num_query_groups consecutive ranks share each.
    """
    return max(1, num_query_groups // tp)


@dataclass(frozen=True)
class Weight:
    """One weight of a layer, beyond the projections that every kind has.

    The core attention has it as a parameter of this name. Initial values depend on the run's seed, the layer and the
    name alone. In checkpoints it is `decoder.layers.self_attention.core_attention.layer_N.NAME`, N from 0.

    Attributes:
        shape: of the whole weight.
        split: the dimension that tensor parallel ranks divide in equal parts; None: each rank has the whole.
        std: of normal initial values; None: all are `fill`.
        may_be_missing: whether a checkpoint of which only weights are loaded may lack it; it keeps its initial values.
        is_gain: whether it scales other values, as a norm's weight does. Weight decay would pull it to 0, and leaves it
            out as it does Megatron's own gains, which it knows by their one dimension.
    """

    name: str
    shape: tuple[int, ...]
    split: int | None = None
    std: float | None = None
    fill: float = 0.0
    may_be_missing: bool = False
    is_gain: bool = False

    @property
    def size(self) -> int:
        """Number of elements of the whole weight."""
        return prod(self.shape)
