"""Predict attention time from FLOPs and query rows.

The prediction is FLOPs at a fixed rate, plus a time per query row. The rate does not depend on the mask. Both terms are
fitted by least squares on relative error to benchmarks of an H200 (`kernels/results/2026-11-29-h200-benchmarks.json`,
`-sparse-peers.json`: bf16, head dims 128 and 64, 8k to 128k tokens, densities 0.03 to 1), where dense attention takes
what it takes on an H100. The time per row is independent of what the row keeps (q, out, the end of the softmax; in the
backward the sums of dq). It explains why sparse masks run at lower rates. The prediction is within 7 % of each forward
measurement, and 9 % of each backward one, in blocks of 64 and of 128, with grouped heads and without. Longer sequences
were measured with older kernels alone: at 512k and 1M tokens, passes reached 88 to 101 % of their rates at 128k.

Rates with head dim 64 in dense layers and in blocks of 64, and those of the portable kernels, come from profiled steps
(`launch/results/2026-11-26-h100x2-scaling.json`, `2026-11-30-h200x2-scaling.json`,
`2026-11-26-h100-te-breakdown.json`).
"""

from dataclasses import dataclass, fields, replace

from s2train.attention.kind import LayerLayout
from s2train.costs.attention import attention_flops

BACKWARD_FLOPS = 2.5  # per forward FLOP: five matrix products instead of two


@dataclass(frozen=True)
class Rate:
    """Speed of one attention pass: FLOP/s over kept positions, seconds per row.

    A row is one query of one head.
    """

    flops: float
    row: float = 0.0

    def seconds(self, flops: float, rows: int) -> float:
        return flops / self.flops + rows * self.row

    def scaled(self, factor: float) -> "Rate":
        """Return this rate, `factor` times as fast."""
        return Rate(factor * self.flops, self.row / factor)


_DENSE_FIELDS = ("dense_forward", "dense_backward", "narrow_dense_forward", "narrow_dense_backward")
# From `kernels/results/2026-11-28-h100-dense-check.json`, times the fraction of cuDNN's standalone rates that steps
# reach: 0.98, and 0.895 with head dim 64. FlashAttention-4 with head dim 64 took 69.5 and 180.5 ms of profiled 1B steps
# (median; `launch/results/2026-11-30-h200x2-scaling*.json` and `2026-11-29-h200-library-steps-fused.json`), 506 and 487
# TFLOP/s. In steps of 125M models it is 2 to 8 % faster (`2026-11-29-h200-quality-125m`): these rates lie between.
_DENSE = {"fa4": (655e12, 610e12, 530e12, 510e12), "s2train": (650e12, 588e12, 385e12, 414e12)}
# Fraction of the rate that a deterministic backward reaches.
_DETERMINISTIC = {"fa4": 0.865, "s2train": 0.51, "flash": 0.585}


@dataclass(frozen=True)
class AttentionRates:
    """Attention speed of one device; the defaults are an H100's (see above).

    Attributes:
        forward, backward: sparse layers (measured in blocks of 64 and more; smaller ones are slower).
        narrow_forward, narrow_backward: with head dims up to 64.
        narrow_forward_64, narrow_backward_64: the same in blocks smaller than 128.
        dense_forward, dense_backward: dense layers with cuDNN.
        narrow_dense_forward, narrow_dense_backward: the same with head dims up to 64.
    """

    forward: Rate = Rate(713e12, 0.149e-9)
    backward: Rate = Rate(640e12, 0.807e-9)
    narrow_forward: Rate = Rate(495e12, 0.078e-9)
    narrow_backward: Rate = Rate(560e12, 0.447e-9)
    # 33.1 and 90.6 ms of the profiled 1B steps that `_DENSE` names, less 2 % for steps of 125M models
    narrow_forward_64: Rate = Rate(414e12, 0.093e-9)
    narrow_backward_64: Rate = Rate(422e12, 0.592e-9)
    dense_forward: Rate = Rate(620e12)
    dense_backward: Rate = Rate(545e12)
    narrow_dense_forward: Rate = Rate(436e12)
    narrow_dense_backward: Rate = Rate(386e12)

    def scaled(self, factor: float) -> "AttentionRates":
        """Return the rates of a device `factor` times as fast."""
        return AttentionRates(**{field.name: getattr(self, field.name).scaled(factor) for field in fields(self)})

    def portable(self) -> "AttentionRates":
        """Return rates with portable kernels in sparse layers, not Hopper's.

        Steps with both were profiled before Hopper's backward became 1.31 times as fast (8k tokens): 1.56 times then.
        """
        slower = {
            field.name: getattr(self, field.name).scaled(1 / (1.96 if "forward" in field.name else 2.05))
            for field in fields(self)
            if "dense" not in field.name
        }
        return replace(self, **slower)

    def dense_by(self, implementation: str, deterministic: bool = False) -> "AttentionRates":
        """Return rates with another implementation than cuDNN in dense layers.

        Its name is as in `dense_attention`.
        """
        rates = self.flash() if implementation in ("flash", "efficient") else self
        if implementation in _DENSE:
            rates = replace(
                rates, **{name: Rate(flops) for name, flops in zip(_DENSE_FIELDS, _DENSE[implementation], strict=True)}
            )
        if deterministic and implementation in _DETERMINISTIC:
            slower = {
                name: getattr(rates, name).scaled(_DETERMINISTIC[implementation])
                for name in _DENSE_FIELDS
                if "backward" in name
            }
            rates = replace(rates, **slower)
        return rates

    def flash(self) -> "AttentionRates":
        """Return rates with FlashAttention-2 in dense layers, fitted the same way."""
        slower = {
            field.name: getattr(self, field.name).scaled(0.56 if "forward" in field.name else 0.59)
            for field in fields(self)
            if "dense" in field.name
        }
        return replace(self, **slower)

    def of_dense(self, head_dim: int) -> tuple[Rate, Rate]:
        """Return forward and backward rates of a dense layer."""
        if head_dim <= 64:
            return self.narrow_dense_forward, self.narrow_dense_backward
        return self.dense_forward, self.dense_backward

    def of_sparse(self, head_dim: int, block_size: int) -> tuple[Rate, Rate]:
        """Return forward and backward rates of a sparse layer."""
        if head_dim > 64:
            return self.forward, self.backward
        if block_size >= 128:
            return self.narrow_forward, self.narrow_backward
        return self.narrow_forward_64, self.narrow_backward_64


@dataclass(frozen=True)
class Seconds:
    """Attention time of one sequence on one device."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


def attention_seconds(layer: LayerLayout, seq_length: int, head_dim: int, rates: AttentionRates) -> Seconds:
    """Predict the time of one layer's attention over one sequence."""
    flops, rows = attention_flops(layer, seq_length, head_dim), len(layer.heads) * seq_length
    forward, backward = rates.of_dense(head_dim) if layer.is_dense else rates.of_sparse(head_dim, layer.block_size)
    return Seconds(forward.seconds(flops, rows), backward.seconds(BACKWARD_FLOPS * flops, rows))


def dense_seconds(num_heads: int, seq_length: int, head_dim: int, rates: AttentionRates) -> Seconds:
    """Predict the time of a dense causal layer's attention over one sequence."""
    rows = num_heads * seq_length
    flops = 4 * head_dim * num_heads * (seq_length * (seq_length + 1) // 2)
    forward, backward = rates.of_dense(head_dim)
    return Seconds(forward.seconds(flops, rows), backward.seconds(BACKWARD_FLOPS * flops, rows))
