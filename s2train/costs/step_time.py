"""Predict a step's time by part, from steps of H100s and H200s.

Products, and elementwise work by torch, come from profiled steps of two shapes, on one GPU and on two:
`launch/results/2026-11-26-h100-te-breakdown.json` (four 7B layers) and `2026-11-26-h100x2-scaling.json` (1B).
Elementwise work by fused kernels comes from single operations, and attention from `s2train.costs.attention_time`. Small
hidden sizes come from whole steps (125M, and 30M, which did not wait for the host). An H200 counts as an H100 scaled by
the ratio of peak rates, but for its products, which were profiled.

How near it is (tests/costs/test_step_time.py):

- Steps with today's kernels, all on H200s, are predicted within 4 %: 125M models at 16k tokens
  (`2026-11-29-h200-quality-125m/`), the 1B hybrid on one to four GPUs (`2026-11-29-h200x4-scaling.json`,
  `2026-11-30-h200x*-scaling*.json`) and 7B layers at 8k to 128k (`2026-11-29-h200-long-steps-te.json`).
- Earlier steps, most of them on H100s, are predicted within 6 % (30M models: 9 %) if what was slower then is added, by
  its own measurements (tests/costs/earlier_kernels.py). H100s were not measured with today's kernels. `MARGIN` is
  wider: it is meant for other models and machines.
- Four context parallel ranks took 4 to 9 % longer with 7B layers at 128k to 1M tokens
  (`2026-11-29-h200x4-long-steps.json`).
- Waits for a slow host are not predicted; `Prediction.slow_host_s` warns of them. Small models waited
  (`2026-11-28-h100-library-losses.json`), and the 1B hybrid on four context parallel ranks with 8k tokens each (12 %
  longer). So did probably, unprofiled, a 125M hybrid with one micro batch a step on each of four GPUs (23 % longer),
  and its dense twin (9 % longer).

Other GPUs are estimated as H100s scaled by the ratio of peak rates: FLOP/s for products and attention, memory bandwidth
for elementwise work and the optimizer, link bandwidth for communication. None was measured. More than four tensor or
context parallel ranks, pipeline stages, and several machines are estimates too, from these assumptions:

- Ranks are numbered as in Megatron: tensor parallel ranks next to each other, then context, data and pipeline parallel.
- A collective operation between machines uses the network card of each GPU that takes part: a ring of four GPUs of
  each machine moves four times what one card does, up to the link's speed.
- Gradients are scattered beside the last micro batch's backward, and weights gathered beside the first one's forward.
  Only what takes longer is exposed, but at least the time of the same bytes over the machine's own link: 11 ms for a 1B
  model on two GPUs, where 5 and 11 ms were measured. That these operations slow the work beside them, there by 2 % of a
  step, is not counted.
- Stages send and receive activations and their gradients between micro batches, beside nothing.
- A context parallel exchange takes a constant time, in which ranks wait for each other, and a time per byte.
"""

import bisect
from collections import Counter
from dataclasses import dataclass, fields

from s2train.attention.hybrid import HybridLayout
from s2train.attention.kind import LayerLayout
from s2train.attention.weights import kv_heads_on_rank
from s2train.config import PretrainConfig, head_dim
from s2train.costs.attention import rank_spread
from s2train.costs.attention_time import AttentionRates, Seconds, attention_seconds
from s2train.costs.exchange import exchange_mode
from s2train.costs.implementations import Implementations
from s2train.costs.parameters import layer_parameters, mlp_parameters, stage_parameters
from s2train.costs.rank_share import Chunks, data_parallel, micro_batches, rank_tokens
from s2train.costs.stages import Stages
from s2train.costs.tensor_parallel import TensorParallel, collective_share, slowdown
from s2train.environment.hardware import GpuRates, Hardware, gpu_rates

MARGIN = 0.1  # of a measured step
GPUS_PER_MACHINE = 8
NETWORK = 50e9  # bytes/s per GPU between machines: 400 Gb/s

_H100, _H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
# Hidden size -> FLOP/s of its matrix products in bf16.
_PRODUCTS = ((384, 400e12), (768, 700e12), (2048, 784e12), (4096, 730e12))
# Fraction of these that H200s reach: products of profiled 1B steps take 553 to 567 ms, and 522 on an H100
# (2026-11-29-h200-library-steps-fused.json, 2026-11-29-h200x4-scaling.json, 2026-11-30-h200x2-scaling*.json).
_H200_PRODUCTS = 0.93
# Seconds per token, layer and hidden dimension: norms, rotation, SwiGLU, residuals, by torch. And the width of the
# widest MLP measured, in hidden sizes: SwiGLU of a wider one takes longer.
_ELEMENTWISE, _MLP_WIDTH = 0.104e-9, 4
# Seconds of single operations, by torch and fused: SwiGLU per output (2026-11-28-h100-elementwise.json); a residual sum
# with its norm per dimension; per dimension of the projection, its split into heads with Liger-Kernel's rotation, and
# both at once (2026-11-30-h200-elementwise.json, scaled by memory bandwidth).
_SWIGLU, _FUSED_SWIGLU = 5.6e-12, 5.3e-12
_SUM, _FUSED_SUM = 10.9e-12, 6.5e-12
_FUSED_ROTATION, _FUSED_SPLIT = 6.9e-12, 2.9e-12
# Seconds per logit, without products; the same files, `in_place` from the second.
_LOSS = {"torch": 15.5e-12, "liger": 7.6e-12, "in_place": 3.6e-12, "linear": 8.0e-12}
# Part of a layer's elementwise forward that `train.recompute=mlp` repeats: SwiGLU, norms and a residual sum, by the
# bytes that they move in a 7B layer.
_MLP_SHARE = 0.7
# Seconds per parameter of torch's fused AdamW at an H100's memory rate: 14.6 ms of a 1B step on an H200
# (launch/results/2026-11-30-h200x2-scaling.json). transformer-engine's took 17.5e-12 on an H100.
_ADAM = 18.9e-12
_USED_MEMORY, _USED_LINK = 0.8, 0.69  # fractions of the peak
# Context parallel: fraction of the link's peak that gathers reach (launch/results/2026-11-26-h100x2-cp-bytes.json), and
# seconds per dense layer and micro batch that ranks wait for each other (2026-11-26-h100x2-scaling.json).
_CP_LINK, _CP_WAIT = 0.4, 0.87e-3
_CP_SPARSE = 0.4  # a sparse layer's exchange relative to a dense layer's
# Seconds between kernels, per layer and micro batch: 5.6 and 3.9 ms of 1B steps of 32 and 16 (the same, and with micro
# batches of two). An H100 waited 0.45e-3 in 2026-11-26-h100x2-scaling.json.
_HOST = 0.22e-3
# Seconds to launch the kernels of a layer and micro batch on the slowest host measured, and for one of several ranks on
# a host: four context parallel ranks of the 1B model took 10.4 ms (launch/results/2026-11-29-h200x4-scaling.json), four
# data parallel ranks of a 125M dense model 10.2 ms (2026-11-29-h200-quality-125m/).
_SLOW_HOST, _SLOW_SHARED_HOST = 8e-3, 10.5e-3


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest pipeline stage.

    Attributes:
        linear: matrix products of layers and LM head.
        elementwise: norms, rotation, SwiGLU, loss, sums of gradients.
        attention: in all layers.
        recomputation: forward passes that `train.recompute` repeats.
        communication: what is not hidden behind other work.
        optimizer: Adam and the gradient norm.
        host: between kernels.
        pipeline: waiting for other stages at the beginning and end of a step.
    """

    linear: float = 0.0
    elementwise: float = 0.0
    attention: float = 0.0
    recomputation: float = 0.0
    communication: float = 0.0
    optimizer: float = 0.0
    host: float = 0.0
    pipeline: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        return {part.name: getattr(self, part.name) for part in fields(self)}

    def __add__(self, other: "StepTime") -> "StepTime":
        return StepTime(**{name: part + getattr(other, name) for name, part in self.parts().items()})

    def __mul__(self, factor: float) -> "StepTime":
        return StepTime(**{name: factor * part for name, part in self.parts().items()})


@dataclass(frozen=True)
class Prediction:
    """Prediction of a step.

    Attributes:
        tokens_per_s: of all GPUs.
        mfu: FLOPs that the layout keeps over the GPUs' peak.
        caveats: reasons why it is an estimate; empty if such steps were measured.
        te: transformer-engine's layers.
        slow_host_s: seconds that a slow host takes to launch a layer's kernels, if the GPU runs them faster; else None.
    """

    time: StepTime
    tokens_per_s: float
    mfu: float
    caveats: tuple[str, ...]
    te: bool
    slow_host_s: float | None


def predict_step(
    cfg: PretrainConfig,
    hybrid: HybridLayout,
    stages: Stages,
    world_size: int,
    hardware: Hardware,
    flops_per_token: float,
    impl: Implementations,
) -> Prediction | None:
    """Predict the time of a step on `world_size` ranks like `hardware`.

    Returns None where no measurement applies: on a CPU, on a GPU of unknown peak, in fp32, and for layers whose reads
    depend on the data.

    Args:
        impl: what computes dense attention, SwiGLU, rotation and loss.
    """
    if hardware.kind != "cuda" or hardware.rates is None or cfg.train.precision != "bf16" or not hybrid.is_static:
        return None
    model = _Model(cfg, hybrid, world_size, hardware, hardware.rates, impl)
    of_layer = {layer: model.layer(layer) for layer in set(hybrid.layers)}
    chunks, start = [], 0
    for size in stages.chunks:
        counts = Counter(hybrid.layers[start : start + size])
        chunks.append(sum((of_layer[layer] * count for layer, count in counts.items()), StepTime()))
        start += size
    chunks[-1] += model.head()
    chunks = [chunk + model.sends() for chunk in chunks]
    ranks = [sum(chunks[rank :: stages.pp], StepTime()) for rank in range(stages.pp)]
    slowest = max(range(stages.pp), key=lambda rank: ranks[rank].total)
    number = micro_batches(cfg, world_size)
    waiting = (sum(rank.total for rank in ranks) - ranks[slowest].total) / (cfg.parallel.vpp or 1)
    time = (
        ranks[slowest] * number
        + StepTime(pipeline=waiting)
        + model.ends(slowest, stages.layers_of_rank(hybrid, slowest), ranks[slowest])
    )
    tokens_per_s = cfg.train.global_batch_size * cfg.train.seq_length / time.total
    in_layers = ranks[slowest].total / max(sum(stages.of_rank(slowest)), 1)
    slow_host = _SLOW_SHARED_HOST if world_size > 1 else _SLOW_HOST
    return Prediction(
        time=time,
        tokens_per_s=tokens_per_s,
        mfu=tokens_per_s * flops_per_token / (world_size * hardware.rates.bf16),
        caveats=tuple(_caveats(cfg, world_size, hardware)),
        te=impl.te,
        slow_host_s=slow_host if in_layers < slow_host else None,
    )


class _Model:
    """Times of a micro batch, and of a step's ends.

    They are of one rank.
    """

    def __init__(
        self,
        cfg: PretrainConfig,
        hybrid: HybridLayout,
        world_size: int,
        hardware: Hardware,
        rates: GpuRates,
        impl: Implementations,
    ) -> None:
        self.cfg, self.world_size, self.impl, self.groups = cfg, world_size, impl, hybrid.num_query_groups
        self.te = impl.te
        h100 = gpu_rates(_H100)
        assert h100 is not None
        self.compute, self.memory = rates.bf16 / h100.bf16, rates.memory / h100.memory
        self.product_share = self.compute * (_H200_PRODUCTS if rates == gpu_rates(_H200) else 1.0)
        self.bandwidth, self.link = _USED_MEMORY * rates.memory, rates.link
        self.tokens = rank_tokens(cfg)
        self.attention = _attention_rates(cfg, hardware, impl, self.compute)
        speed = self._speed(cfg.parallel.tp, used=collective_share(cfg.parallel.tp))
        self.tensor_parallel = TensorParallel(cfg, self.tokens, self._products(), speed, self.link)

    def layer(self, layer: LayerLayout) -> StepTime:
        """Return a micro batch's time in one layer, forward and backward."""
        model, tp = self.cfg.model, self.cfg.parallel.tp
        matmul = layer_parameters(model, layer).matmul
        linear = 6 * matmul / tp * self.tokens / self._products()
        around = self.tokens * self._elementwise() + self.tensor_parallel.copied() / self.bandwidth
        of_activations = around + self.tokens * self._qk_norm()
        attention = self._attention(layer)
        exchange = self._context_parallel(layer)
        waits = self.tensor_parallel.layer()
        found = StepTime(
            linear=linear,
            elementwise=of_activations,
            attention=attention.both,
            communication=waits.step + 2 * self._shared_projection() + exchange,
            host=_HOST,
        )
        if self.cfg.train.recompute == "full":
            third = (linear + of_activations) / 3
            # keys and values, not their gradients
            repeated = waits.forward + self._shared_projection() + exchange / 2
            return found + StepTime(recomputation=third + attention.forward, communication=repeated)
        if self.cfg.train.recompute == "selective":
            return found + StepTime(recomputation=attention.forward)
        if self.cfg.train.recompute == "mlp":
            third = (linear * mlp_parameters(model) / matmul + _MLP_SHARE * around) / 3
            return found + StepTime(recomputation=third, communication=waits.mlp)
        return found

    def head(self) -> StepTime:
        """Return a micro batch's time in the LM head and loss."""
        model, tp = self.cfg.model, self.cfg.parallel.tp
        weights = model.vocab_size * model.hidden_size
        logits = self.tokens * model.vocab_size / tp
        loss = self.impl.loss(self.cfg)
        products = 8 if loss == "linear" else 6  # its backward repeats the product
        return StepTime(
            linear=products * weights / tp * self.tokens / self._products(),
            elementwise=_LOSS[loss] * logits / self.memory + self._sum(weights),
            communication=self.tensor_parallel.head(weights, loss),
        )

    def sends(self) -> StepTime:
        """Return a micro batch's time to send and receive activations.

        The activations are those of a model chunk; their gradients are included.
        """
        cfg = self.cfg
        if cfg.parallel.pp == 1:
            return StepTime()
        split = cfg.parallel.tp if cfg.parallel.sequence_parallel else 1
        nbytes = self.tokens * cfg.model.hidden_size * 2 / split
        return StepTime(communication=2 * nbytes / self._speed(1, stride=self.world_size))

    def ends(self, stage: int, chunks: Chunks, micro_batch: StepTime) -> StepTime:
        """Return the time of once-a-step work.

        This is the optimizer, and what sums and copies over data parallel ranks take longer than the work beside them.

        Args:
            micro_batch: a micro batch's time on the stage.
        """
        cfg, parallel = self.cfg, self.cfg.parallel
        layers = [layer for chunk in chunks for layer in chunk]
        held = stage_parameters(cfg.model, parallel, stage, layers)
        shards = data_parallel(cfg, self.world_size) * parallel.cp
        moved = held * (shards - 1) / shards
        third = (micro_batch.linear + micro_batch.elementwise + micro_batch.attention) / 3
        # fp32 gradients are scattered and bf16 weights gathered; or fp32 gradients are scattered and gathered
        gradients, weights = (4, 2) if parallel.distributed_optimizer else (8, 0)
        exposed = self._exposed(gradients * moved, 2 * third + micro_batch.recomputation, parallel.overlap_grad_reduce)
        # Megatron accepts both overlaps or neither.
        both = parallel.overlap_param_gather and parallel.overlap_grad_reduce
        exposed += self._exposed(weights * moved, third, both)
        adam = _ADAM / self.memory
        return StepTime(
            optimizer=held / (shards if parallel.distributed_optimizer else 1) * adam,
            communication=exposed,
        )

    def _exposed(self, nbytes: float, beside: float, overlaps: bool) -> float:
        """Return the seconds that moving `nbytes` adds to a step.

        Data parallel ranks exchange these bytes.

        Args:
            beside: seconds of the work during which they can be moved.
            overlaps: whether they are moved during computation.
        """
        parallel = self.cfg.parallel
        ranks = data_parallel(self.cfg, self.world_size) * parallel.cp
        whole = nbytes / self._speed(ranks, stride=parallel.tp)
        return max(nbytes / (_USED_LINK * self.link), whole - beside) if overlaps else whole

    def _products(self) -> float:
        """Return FLOP/s of matrix products."""
        sizes, rates = zip(*_PRODUCTS, strict=True)
        hidden = self.cfg.model.hidden_size
        place = bisect.bisect_left(sizes, hidden)
        rate = rates[min(place, len(sizes) - 1)]
        if 0 < place < len(sizes):
            share = (hidden - sizes[place - 1]) / (sizes[place] - sizes[place - 1])
            rate = rates[place - 1] + share * (rates[place] - rates[place - 1])
        if self.cfg.fp8 != "none":
            rate *= 1.77
        elif self.te:
            rate *= 0.967
        return rate * self.product_share / slowdown(self.cfg.parallel)

    def _elementwise(self) -> float:
        """Return seconds per token of a layer's elementwise work, without `_qk_norm`."""
        cfg, model, parallel = self.cfg, self.cfg.model, self.cfg.parallel
        # Measured with transformer-engine's fused norms; FP8 adds its casts.
        share = (0.98 if cfg.fp8 != "none" else 0.61) if self.te else 1.0
        swiglu, sums = _SWIGLU * model.ffn_hidden_size, 2 * _SUM * model.hidden_size
        measured = _SWIGLU * min(model.ffn_hidden_size, _MLP_WIDTH * model.hidden_size)
        heads = share * _ELEMENTWISE * model.hidden_size - measured - sums
        if self.impl.fuses_swiglu(cfg):
            swiglu = _FUSED_SWIGLU * model.ffn_hidden_size
        if self.impl.fuses_sums(cfg):
            # both of a layer's; the second is not fused where the layer's end ends what is recomputed in full
            fused = 1 if cfg.train.recompute == "full" else 2
            sums -= fused * (_SUM - _FUSED_SUM) * model.hidden_size
        if self.impl.fuses_rotation(cfg):
            of_heads = _FUSED_SPLIT if self.impl.fuses_split(cfg) else _FUSED_ROTATION
            heads = of_heads * (model.num_attention_heads + 2 * model.num_query_groups) * head_dim(model)
        split = parallel.tp if parallel.sequence_parallel else 1
        return ((swiglu + heads) / parallel.tp + sums / split) / self.memory

    def _qk_norm(self) -> float:
        """Return seconds per token of the norms of queries and keys.

        By the bytes that they move: the forward reads and writes each, the backward reads two tensors of their size and
        writes one.
        """
        model, tp = self.cfg.model, self.cfg.parallel.tp
        heads = model.num_attention_heads / tp + kv_heads_on_rank(model.num_query_groups, tp)
        return 5 * 2 * heads * head_dim(model) / self.bandwidth if model.qk_norm else 0.0

    def _sum(self, weights: int) -> float:
        """Return seconds to add the embedding's gradient to an fp32 one.

        Linear layers add theirs within the product. The weights are divided over ranks.
        """
        return 0.0 if self.te else 10 * weights / self.cfg.parallel.tp / self.bandwidth

    def _attention(self, layer: LayerLayout) -> Seconds:
        cfg = self.cfg
        seconds = attention_seconds(layer, cfg.train.seq_length, head_dim(cfg.model), self.attention)
        busiest = 1 + rank_spread(layer, cfg.train.seq_length, cfg.parallel.tp)
        share = cfg.train.micro_batch_size * busiest / (cfg.parallel.tp * cfg.parallel.cp)
        return Seconds(share * seconds.forward, share * seconds.backward)

    def _shared_projection(self) -> float:
        """Return seconds to gather the QKV projection's output.

        Ranks gather it only if they share KV heads. The backward pass takes the same time.
        """
        model, tp = self.cfg.model, self.cfg.parallel.tp
        if tp <= model.num_query_groups:
            return 0.0
        width = (model.num_attention_heads + 2 * model.num_query_groups) * head_dim(model)
        return self.tokens * width * 2 * (tp - 1) / tp / self._speed(tp, stride=1)

    def _context_parallel(self, layer: LayerLayout) -> float:
        cfg, cp = self.cfg, self.cfg.parallel.cp
        if cp == 1:
            return 0.0
        keys = self.tokens * cp * kv_heads_on_rank(self.groups, cfg.parallel.tp) * head_dim(cfg.model) * 2  # bytes
        mode = exchange_mode(layer, self.groups, cfg.train.seq_length, cfg.parallel)
        gathers = layer.is_dense or mode == "gather"
        # Each rank fetches other blocks, through its own network card.
        speed = self._speed(cp, stride=cfg.parallel.tp, shares=gathers, used=_CP_LINK)
        whole = _CP_WAIT + 4 * keys * (cp - 1) / cp / speed  # keys and values, and their gradients
        return whole if gathers else _CP_SPARSE * whole

    def _speed(self, ranks: int, stride: int = 1, shares: bool = True, used: float = _USED_LINK) -> float:
        """Return bytes/s over `ranks` ranks, each `stride` ranks after the one before.

        Args:
            shares: whether the GPUs of a machine share what arrives, so that the network cards of all carry it.
            used: fraction of the link's peak that is reached.
        """
        if ranks * stride <= GPUS_PER_MACHINE:
            return used * self.link
        together = max(1, min(ranks, GPUS_PER_MACHINE // stride)) if shares else 1
        return used * min(self.link, together * NETWORK)


def _attention_rates(cfg: PretrainConfig, hardware: Hardware, impl: Implementations, factor: float) -> AttentionRates:
    rates = AttentionRates().dense_by(impl.dense(cfg), cfg.train.deterministic)
    on_hopper = hardware.capability is None or hardware.capability[0] == 9
    if not on_hopper or cfg.attention_backend == "portable" or cfg.train.deterministic or cfg.layout.block_size < 64:
        rates = rates.portable()
    return rates.scaled(factor)


def _caveats(cfg: PretrainConfig, world_size: int, hardware: Hardware) -> list[str]:
    assert hardware.rates is not None
    found = []
    if hardware.rates not in (gpu_rates(_H100), gpu_rates(_H200)):
        found.append(f"an H100's, scaled by the peak rates of {hardware.name}")
    if cfg.parallel.tp > 4:
        found.append("no parallel.tp above 4 was measured")
    if cfg.parallel.cp > 4:
        found.append("no parallel.cp above 4 was measured")
    if data_parallel(cfg, world_size) > 4:
        found.append("no data parallelism above 4 was measured")
    if cfg.parallel.tp > 2 and cfg.parallel.tp_comm_overlap:
        found.append("parallel.tp_comm_overlap was measured on two ranks alone")
    if cfg.parallel.pp > 1:
        found.append("no pipeline was measured")
    if world_size > GPUS_PER_MACHINE:
        found.append(f"machines of {GPUS_PER_MACHINE} GPUs, each with {NETWORK * 8 / 1e9:.0f} Gb/s, are assumed")
    if cfg.parallel.tp > cfg.model.num_query_groups:
        found.append("no shared KV heads were measured")
    if cfg.model.qk_norm:
        found.append("the time of model.qk_norm was not measured")
    if cfg.optim.name != "adam":
        found.append(f"optim.name={cfg.optim.name} is counted as Adam")
    if cfg.optim.cpu_offload:
        found.append("the offloaded optimizer's time is left out")
    if cfg.data.attention_within_documents:
        found.append("documents are counted as one")
    return found
