"""FLOPs of a run's phases: attention warm-up, frozen trunk, and the rest."""

from collections.abc import Sequence
from dataclasses import dataclass

from s2train.attention.hybrid import HybridLayout
from s2train.config import PretrainConfig
from s2train.costs.attention import attention_flops
from s2train.costs.flops import teacher_flops, token_flops
from s2train.costs.parameters import attention_shape


@dataclass(frozen=True)
class Phase:
    """Steps `first` to `last` of a run, counted from 1.

    Attributes:
        flops: training FLOPs per token, with the backward pass of a frozen trunk, which runs, and a teacher's forward.
        warms_up: kinds of attention that warm up.
        is_trunk_frozen: whether only weights that kinds of attention add learn.
    """

    first: int
    last: int
    flops: float
    warms_up: tuple[str, ...]
    is_trunk_frozen: bool


def phases(cfg: PretrainConfig, hybrid: HybridLayout) -> tuple[Phase, ...]:
    """Return the phases of a run, first to last.

    If nothing differs, the run is one phase.
    """
    steps, frozen = cfg.train.steps, cfg.train.freeze_trunk_steps
    ends = {min(steps, end) for end in (frozen, steps, *(layer.kind.warm_up_steps() for layer in hybrid.layers))}
    found, first = [], 1
    for last in sorted(ends - {0}):
        warming = [layer for layer in hybrid.layers if layer.kind.warm_up_steps() >= last]
        labels = tuple(dict.fromkeys(layer.kind.label for layer in warming))
        flops = token_flops(cfg.model, hybrid, cfg.train.seq_length).sparse + _more(cfg, hybrid, last)
        flops += teacher_flops(cfg.model, hybrid, cfg.train.seq_length)
        found.append(Phase(first, last, flops, labels, frozen >= last))
        first = last + 1
    return tuple(found)


def mean_flops(of_run: Sequence[Phase], first: int, last: int) -> float:
    """Average the FLOPs per token over steps `first` to `last`."""
    shares = [(max(0, min(last, p.last) - max(first, p.first) + 1), p.flops) for p in of_run]
    return sum(steps * flops for steps, flops in shares) / sum(steps for steps, _ in shares)


def _more(cfg: PretrainConfig, hybrid: HybridLayout, last: int) -> float:
    """Count the FLOPs per token that warm-ups add in a phase.

    They are added to the layers' usual attention, in the phase that ends at step `last`.
    """
    length, shape, more = cfg.train.seq_length, attention_shape(cfg.model), 0.0
    for layer in hybrid.layers:
        if (kind := layer.kind).warm_up_steps() >= last:
            usual = attention_flops(layer, length, shape.head_dim) + kind.extra_flops(layer, length, shape)
            more += kind.warm_up_flops(layer, length, shape) - usual
    return 3 * more / length
