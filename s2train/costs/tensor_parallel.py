"""Predicts what tensor parallel ranks add to a step's time."""

from dataclasses import dataclass

from s2train.config import ParallelConfig, PretrainConfig, head_dim
from s2train.costs.overlapped import Exchanges

# Matrix products divided over tensor parallel ranks are slower, for two ranks and for four: they are smaller, and
# collectives run beside them (launch/results/2026-11-29-h200x4-scaling.json).
_SLOWER_PRODUCTS = 0.09
# Fraction of the link's peak that tensor parallel collectives reach, by ranks; the same file.
_LINK = {2: 0.47, 4: 0.56}
# With overlap: the same of products, and of the link's peak that copy engines reach
# (launch/results/2026-11-30-h200x2-scaling-overlap.json and its trace: 134 MB in 0.35 ms).
_SLOWER_OVERLAPPED, _COPY_LINK = 0.02, 0.84
_WIDTH = 2  # bytes of an element


def slowdown(parallel: ParallelConfig) -> float:
    """Return the factor by which divided products take longer."""
    if parallel.tp == 1:
        return 1.0
    return 1 + (_SLOWER_OVERLAPPED if parallel.tp_overlaps else _SLOWER_PRODUCTS)


def collective_share(ranks: int) -> float:
    """Return the fraction of the link's peak that collectives reach."""
    return _LINK.get(ranks, max(_LINK.values()))


@dataclass(frozen=True)
class Waits:
    """Seconds that a layer's products wait for other ranks.

    Attributes:
        step: forward and backward.
        forward: a repeated forward pass.
        mlp: a repeated forward pass of the MLP.
    """

    step: float
    forward: float
    mlp: float


@dataclass(frozen=True)
class TensorParallel:
    """Exchanges of a micro batch's stream between tensor parallel ranks.

    Attributes:
        tokens: of the micro batch on a rank.
        products: FLOP/s of a rank's matrix products.
        speed: bytes/s of collectives.
        link: peak bytes/s in one direction to another GPU.
    """

    cfg: PretrainConfig
    tokens: int
    products: float
    speed: float
    link: float

    def layer(self) -> Waits:
        """Return what a layer's products wait."""
        model, parallel = self.cfg.model, self.cfg.parallel
        if parallel.tp == 1:
            return Waits(0.0, 0.0, 0.0)
        if not parallel.tp_overlaps:
            # Gathers and scatters of the stream. With sequence parallelism four more run beside the backward's
            # products; without it a sum is a scatter and a gather.
            step = 6 if parallel.sequence_parallel else 8
            return Waits(step * self._unit(), 4 * self._unit(), 2 * self._unit())
        queries, keys = model.num_attention_heads * head_dim(model), model.num_query_groups * head_dim(model)
        widths = queries + 2 * keys, queries, 2 * model.ffn_hidden_size, model.ffn_hidden_size
        qkv, proj, fc1, fc2 = (self._product(width * model.hidden_size) for width in widths)
        exchanges = self._exchanges()
        forward = exchanges.forward([qkv, proj, fc1, fc2])
        return Waits(forward + exchanges.backward([qkv, fc1], [proj, fc2]), forward, exchanges.forward([fc1, fc2]))

    def head(self, weights: int, loss: str) -> float:
        """Return what the LM head's products wait.

        Args:
            weights: of all ranks.
            loss: what computes the loss; "linear" computes the product too, and doesn't overlap.
        """
        parallel = self.cfg.parallel
        if parallel.tp == 1:
            return 0.0
        if not parallel.tp_overlaps or loss == "linear":
            return (3 if parallel.sequence_parallel else 4) * self._unit()
        product = self._product(weights)
        return self._exchanges().forward([product]) + self._exchanges().backward([product], [])

    def copied(self) -> float:
        """Return bytes that a layer's overlapped exchanges move within a GPU."""
        if not self.cfg.parallel.tp_overlaps:
            return 0.0
        tp = self.cfg.parallel.tp
        passes = 4 * (1 + 1 / tp) + 6 * 2 / tp  # sums of all ranks' parts; copies of a rank's rows
        return passes * self._stream()

    def _stream(self) -> int:
        return self.tokens * self.cfg.model.hidden_size * _WIDTH

    def _unit(self) -> float:
        """Return seconds to gather or scatter the stream."""
        tp = self.cfg.parallel.tp
        return self._stream() * (tp - 1) / tp / self.speed

    def _product(self, weights: int) -> float:
        """Return seconds of a forward product."""
        return 2 * weights / self.cfg.parallel.tp * self.tokens / self.products

    def _exchanges(self) -> Exchanges:
        tp = self.cfg.parallel.tp
        return Exchanges(tp, self._stream() / tp / (_COPY_LINK * self.link))
