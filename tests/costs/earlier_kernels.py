"""What a step took longer until 2026-11-28, by measurements of what computed it then."""

from s2train.attention.kind import LayerLayout
from s2train.config import head_dim
from s2train.costs.attention import attention_flops
from s2train.costs.attention_time import BACKWARD_FLOPS, AttentionRates, Rate, attention_seconds
from s2train.planning import Plan, hybrid_layout

# Sparse attention, by (blocks of 128, grouped heads): fitted as today's rates are, to the benchmark of that day
# (kernels/results/2026-11-22-h100-benchmarks.json).
_FORWARD = {True: Rate(715e12, 0.160e-9), False: Rate(734e12, 0.264e-9)}
_BACKWARD = {
    (True, False): Rate(605e12, 1.789e-9),
    (True, True): Rate(541e12, 1.071e-9),
    (False, False): Rate(578e12, 1.715e-9),
    (False, True): Rate(551e12, 2.439e-9),
}
# Over today's: torch's Adam before its kernels were fused (43.0 ms for 20.9), and waits between kernels
# (launch/results/2026-11-26-h100x2-scaling.json).
_ADAM, _HOST = 43.0 / 20.9, 0.45 / 0.22
_H100_MEMORY = 3.35e12  # bytes/s
# Seconds at that rate and per dimension that Liger-Kernel alone took longer than fused sums and our split of the
# projection (launch/results/2026-11-30-h200-elementwise.json).
_SUM, _SPLIT = 10.9e-12 - 6.5e-12, 6.9e-12 - 2.9e-12


def earlier_seconds(plan: Plan, day: str, *, te_adam: bool) -> float:
    """Return the seconds that a planned step took longer on a day.

    Args:
        day: from 2026-11-28 on, the backward of blocks of 128 counts as today's.
        te_adam: transformer-engine was installed, whose Adam was fused.
    """
    cfg, found = plan.cfg, plan.prediction
    assert found is not None
    more = (_HOST - 1) * found.time.host
    if not te_adam:
        more += (_ADAM - 1) * found.time.optimizer
    if not found.te:
        more += _additions(plan) + _elementwise(plan)
    if cfg.attention_backend == "portable":
        return more
    sparse = [layer for layer in hybrid_layout(cfg).layers if not layer.is_dense]
    changed = [layer for layer in sparse if layer.block_size < 128 or day < "2026-11-28"]
    sequences = cfg.train.global_batch_size / plan.world_size  # or as much of them
    return more + sequences * sum(_attention(plan, layer) for layer in changed)


def _additions(plan: Plan) -> float:
    """Weight gradients were added to fp32 ones apart from the products, as the embedding's still is."""
    model = plan.cfg.model
    weights = plan.rank_parameters - model.vocab_size * model.hidden_size / plan.cfg.parallel.tp
    return plan.micro_batches * 10 * weights / (0.8 * _memory(plan))


def _elementwise(plan: Plan) -> float:
    cfg, model = plan.cfg, plan.cfg.model
    if cfg.elementwise != "liger":
        return 0.0
    # with train.recompute=full, one of two sums is fused today, and all is computed four times instead of three
    sums, passes = (1, 4 / 3) if cfg.train.recompute == "full" else (2, 1.0)
    projection = (model.num_attention_heads + 2 * model.num_query_groups) * head_dim(model)
    tokens = cfg.train.global_batch_size * cfg.train.seq_length / plan.world_size
    seconds = passes * (sums * _SUM * model.hidden_size + _SPLIT * projection)
    return model.num_layers * tokens * seconds * _H100_MEMORY / _memory(plan)


def _attention(plan: Plan, layer: LayerLayout) -> float:
    """A sequence's attention in a sparse layer."""
    cfg, dim, length = plan.cfg, head_dim(plan.cfg.model), plan.cfg.train.seq_length
    flops, rows = attention_flops(layer, length, dim), len(layer.heads) * length
    large, grouped = layer.block_size >= 128, cfg.model.num_query_groups < len(layer.heads)
    now = attention_seconds(layer, length, dim, AttentionRates())
    forward = _FORWARD[large].seconds(flops, rows) - now.forward
    backward = _BACKWARD[large, grouped].seconds(BACKWARD_FLOPS * flops, rows) - now.backward
    return (2 if cfg.train.recompute == "full" else 1) * forward + backward


def _memory(plan: Plan) -> float:
    assert plan.hardware.rates is not None
    return plan.hardware.rates.memory
