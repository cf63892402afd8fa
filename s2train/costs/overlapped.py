"""Predicts how long products wait for rows that `parallel.tp_comm_overlap` exchanges.

p ranks each have m rows. A copy of one rank's rows takes c seconds; a product takes g for one rank's rows, p g in all.

- Gathered rows are multiplied as they arrive, this rank's first: products end (p - 1) max(0, c - g) later.
- Products for other ranks come first and are sent one after another: the last arrives as much later.
- Column-parallel layers gather their input again while attention or the MLP's function is computed in the backward, and
  send gradients of inputs while those of weights are computed: sending ends (p - 1) c - (2 p - 1) g later, if at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# Seconds an exchange waits for other ranks: what two H200s took in a step of 326 exchanges, less the above
# (launch/results/2026-11-30-h200x2-scaling-overlap.json). With 163 exchanges of twice the rows it is 107 us.
_WAIT = 33e-6


@dataclass(frozen=True)
class Exchanges:
    """Exchanges of p ranks around products.

    Attributes:
        ranks: p.
        copy: c, seconds.
    """

    ranks: int
    copy: float

    def forward(self, products: Sequence[float]) -> float:
        """Return seconds that a forward pass waits.

        Args:
            products: p g of each linear layer, column- or row-parallel.
        """
        return sum(_WAIT + self._behind(product) for product in products)

    def backward(self, columns: Sequence[float], rows: Sequence[float]) -> float:
        """Return seconds that a backward pass waits.

        Args:
            columns, rows: p g of each column-parallel and row-parallel layer's forward product.
        """
        p = self.ranks
        sent = ((p - 1) * self.copy - (2 * p - 1) * product / p for product in columns)
        return self.forward(rows) + sum(2 * _WAIT + max(0.0, late) for late in sent)

    def _behind(self, product: float) -> float:
        return (self.ranks - 1) * max(0.0, self.copy - product / self.ranks)
