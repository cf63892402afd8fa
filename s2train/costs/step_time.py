"""Predicted time of a training step, by part, from what the parts of an H100's steps were measured to take.

Products and elementwise work are those of profiled steps of two shapes, on one GPU and on two:
`launch/results/2026-11-26-h100-te-breakdown.json` (four 7B layers) and `2026-11-26-h100x2-scaling.json` (1B);
attention is `s2train.costs.attention_time`'s. Small hidden sizes are as whole steps have them (125M, and 30M, which
waited for no host). Every whole step measured on H100s is met within `MARGIN` (tests/costs/test_step_time.py), but
those that waited for a slow host (`2026-11-28-h100-library-losses.json`), which `Prediction.waits_for_host` warns of.

Other GPUs are H100s slower or faster by the ratio of peak rates: products and attention by FLOP/s, elementwise work
and the optimizer by memory, communication by links. Nobody has measured that: it is an estimate. So are divisions
over tensor parallel ranks beyond two, over pipeline stages, and over machines.
"""

import bisect
from dataclasses import dataclass, fields

from s2train.attention.hybrid import HybridLayout
from s2train.attention.kind import LayerLayout
from s2train.config import PretrainConfig
from s2train.costs.attention import rank_spread
from s2train.costs.attention_time import AttentionRates, Seconds, attention_seconds
from s2train.costs.implementations import Implementations
from s2train.costs.memory import Chunks, data_parallel, micro_batches
from s2train.costs.parameters import head_dim, layer_parameters, stage_parameters
from s2train.costs.stages import Stages
from s2train.environment.hardware import GpuRates, Hardware, gpu_rates

MARGIN = 0.1  # of a measured step
GPUS_PER_MACHINE = 8
NETWORK = 50e9  # bytes/s of a GPU between machines: 400 Gb/s

_H100 = "NVIDIA H100 80GB HBM3"
# Hidden size -> FLOP/s of its matrix products in bf16.
_PRODUCTS = ((384, 400e12), (768, 700e12), (2048, 784e12), (4096, 730e12))
_ELEMENTWISE = 0.104e-9  # seconds a token, layer and hidden dimension: norms, rotation, SwiGLU, residuals
# Seconds that Liger-Kernel's kernels save: of SwiGLU for each of its outputs, of rotation for each dimension of queries
# and keys (launch/results/2026-11-28-h100-elementwise.json, -rotation.json).
_FUSED_SWIGLU, _FUSED_ROTATION = 0.26e-12, 25.4e-12
_LOSS = {"torch": 15.5e-12, "liger": 7.6e-12, "linear": 8.0e-12}  # seconds a logit, without products; the first file
_SPLIT_SHARE = 0.3  # of them lies between a layer's products, and so is split over tensor parallel ranks
_ADAM, _FUSED_ADAM = 38.9e-12, 17.5e-12  # seconds a parameter: torch's, transformer-engine's
_USED_MEMORY, _USED_LINK = 0.8, 0.69  # of the peak
_SLOWER_PRODUCTS = 0.1  # each time that tensor parallel halves them
_CP_LINK = 0.12  # of the link's peak, waiting for the other ranks included
_CP_SPARSE = 0.4  # of what a dense layer exchanges takes a sparse one
_HOST = 0.45e-3  # seconds between kernels, a layer and micro batch
SLOW_HOST = 8e-3  # seconds to start the kernels of a layer and micro batch, seen on the slowest host


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, of the pipeline stage that the others wait for.

    Attributes:
        linear: matrix products of layers and LM head.
        elementwise: norms, rotation, SwiGLU, loss, sums of gradients.
        attention: in all layers.
        recomputation: forward passes that `train.recompute` repeats.
        communication: what does not hide behind the rest.
        optimizer: Adam and the gradients' norm.
        host: between kernels.
        pipeline: waiting for other stages as a step begins and ends.
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
    """Of a step.

    Attributes:
        tokens_per_s: of all GPUs.
        mfu: FLOPs that the layout keeps over the GPUs' peak.
        caveats: what makes it an estimate; empty where such steps were measured.
        te: transformer-engine's layers.
        waits_for_host: whether a slow host would take longer to start the kernels than the GPU to run them.
    """

    time: StepTime
    tokens_per_s: float
    mfu: float
    caveats: tuple[str, ...]
    te: bool
    waits_for_host: bool


def predict_step(
    cfg: PretrainConfig,
    hybrid: HybridLayout,
    stages: Stages,
    world_size: int,
    hardware: Hardware,
    flops_per_token: float,
    impl: Implementations,
) -> Prediction | None:
    """Time of a step on `world_size` ranks like `hardware`; None where nothing was measured to tell it by.

    That is: on a CPU, on a GPU of unknown peak, in fp32, and for layers that read what the data choose.

    Args:
        impl: what computes dense attention, SwiGLU, rotation and loss.
    """
    if hardware.kind != "cuda" or hardware.rates is None or cfg.train.precision != "bf16" or not hybrid.is_static:
        return None
    model = _Model(cfg, hybrid, world_size, hardware, hardware.rates, impl)
    of_layer = {layer: model.layer(layer) for layer in set(hybrid.layers)}
    chunks, start = [], 0
    for size in stages.chunks:
        chunks.append(sum((of_layer[layer] for layer in hybrid.layers[start : start + size]), StepTime()))
        start += size
    chunks[-1] += model.head()
    ranks = [sum(chunks[rank :: stages.pp], StepTime()) for rank in range(stages.pp)]
    slowest = max(range(stages.pp), key=lambda rank: ranks[rank].total)
    number = micro_batches(cfg, world_size)
    waiting = (sum(rank.total for rank in ranks) - ranks[slowest].total) / (cfg.parallel.vpp or 1)
    time = (
        ranks[slowest] * number
        + StepTime(pipeline=waiting)
        + model.ends(slowest, stages.layers_of_rank(hybrid, slowest))
    )
    tokens_per_s = cfg.train.global_batch_size * cfg.train.seq_length / time.total
    in_layers = ranks[slowest].total / max(sum(stages.of_rank(slowest)), 1)
    return Prediction(
        time=time,
        tokens_per_s=tokens_per_s,
        mfu=tokens_per_s * flops_per_token / (world_size * hardware.rates.bf16),
        caveats=tuple(_caveats(cfg, world_size, hardware)),
        te=impl.te,
        waits_for_host=in_layers < SLOW_HOST,
    )


class _Model:
    """Times of one micro batch on one rank, and of a step's ends."""

    def __init__(
        self,
        cfg: PretrainConfig,
        hybrid: HybridLayout,
        world_size: int,
        hardware: Hardware,
        rates: GpuRates,
        impl: Implementations,
    ) -> None:
        self.cfg, self.world_size, self.impl, self.groups = (
            cfg,
            world_size,
            impl,
            hybrid.num_query_groups,
        )
        self.te = impl.te
        h100 = gpu_rates(_H100)
        assert h100 is not None
        self.compute, self.memory = rates.bf16 / h100.bf16, rates.memory / h100.memory
        self.bandwidth, self.link = _USED_MEMORY * rates.memory, rates.link
        self.tokens = cfg.train.micro_batch_size * cfg.train.seq_length // cfg.parallel.cp
        self.attention = _attention_rates(cfg, hardware, impl, self.compute)

    def layer(self, layer: LayerLayout) -> StepTime:
        """One micro batch through one layer, forward and backward."""
        model, tp = self.cfg.model, self.cfg.parallel.tp
        matmul = layer_parameters(model, layer).matmul
        linear = 6 * matmul / tp * self.tokens / self._products()
        elementwise = self.tokens * (model.hidden_size * self._elementwise_rate() - self._fused() / tp)
        elementwise += self._sums(matmul)
        attention = self._attention(layer)
        units, again = self._tensor_parallel_units()
        found = StepTime(
            linear=linear,
            elementwise=elementwise,
            attention=attention.both,
            communication=units * self._unit() + self._context_parallel(layer),
            host=_HOST,
        )
        if self.cfg.train.recompute == "full":
            third = (linear + elementwise) / 3
            return found + StepTime(recomputation=third + attention.forward, communication=again * self._unit())
        if self.cfg.train.recompute == "selective":
            return found + StepTime(recomputation=attention.forward)
        return found

    def head(self) -> StepTime:
        """One micro batch through the LM head and the loss."""
        model, tp = self.cfg.model, self.cfg.parallel.tp
        weights = model.vocab_size * model.hidden_size
        logits = self.tokens * model.vocab_size / tp
        loss = self.impl.loss(self.cfg)
        products = 8 if loss == "linear" else 6  # the backward multiplies again
        return StepTime(
            linear=products * weights / tp * self.tokens / self._products(),
            elementwise=_LOSS[loss] * logits / self.memory + self._sums(weights),
            communication=self._tensor_parallel_units()[0] / 2 * self._unit(),
        )

    def ends(self, stage: int, chunks: Chunks) -> StepTime:
        """What a step does once: the optimizer, and sums and copies over data parallel ranks."""
        cfg = self.cfg
        layers = [layer for chunk in chunks for layer in chunk]
        held = stage_parameters(cfg.model, cfg.parallel, stage, layers)
        shards = data_parallel(cfg, self.world_size) * cfg.parallel.cp
        nbytes = 6 if cfg.parallel.distributed_optimizer else 8  # fp32 gradients once and bf16 weights, or twice
        adam = (_FUSED_ADAM if self.te else _ADAM) / self.memory
        inside = cfg.parallel.tp * cfg.parallel.cp * data_parallel(cfg, self.world_size)
        return StepTime(
            optimizer=held / (shards if cfg.parallel.distributed_optimizer else 1) * adam,
            communication=held * nbytes * (shards - 1) / shards / self._speed(inside),
        )

    def _products(self) -> float:
        """FLOP/s."""
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
        return rate * self.compute / (1 + _SLOWER_PRODUCTS * (self.cfg.parallel.tp.bit_length() - 1))

    def _elementwise_rate(self) -> float:
        """Seconds a token and hidden dimension of a layer."""
        parallel = self.cfg.parallel
        # Measured with transformer-engine's fused norms; FP8 adds its casts.
        share = (0.98 if self.cfg.fp8 != "none" else 0.61) if self.te else 1.0
        split = 1 / parallel.tp if parallel.sequence_parallel else 1 - _SPLIT_SHARE + _SPLIT_SHARE / parallel.tp
        return _ELEMENTWISE * share * split / self.memory

    def _fused(self) -> float:
        """Seconds a token and layer that Liger-Kernel's kernels save."""
        model, saved = self.cfg.model, 0.0
        if self.impl.fuses_swiglu(self.cfg):
            saved += _FUSED_SWIGLU * model.ffn_hidden_size
        if self.impl.fuses_rotation(self.cfg):
            saved += _FUSED_ROTATION * (model.num_attention_heads + model.num_query_groups) * head_dim(model)
        return saved / self.memory

    def _sums(self, weights: int) -> float:
        """Seconds to add the gradients of so many weights, divided over ranks, to fp32 ones."""
        return 0.0 if self.te else 10 * weights / self.cfg.parallel.tp / self.bandwidth

    def _attention(self, layer: LayerLayout) -> Seconds:
        cfg = self.cfg
        seconds = attention_seconds(layer, self.groups, cfg.train.seq_length, head_dim(cfg.model), self.attention)
        busiest = 1 + rank_spread(layer, cfg.train.seq_length, cfg.parallel.tp)
        share = cfg.train.micro_batch_size * busiest / (cfg.parallel.tp * cfg.parallel.cp)
        return Seconds(share * seconds.forward, share * seconds.backward)

    def _tensor_parallel_units(self) -> tuple[int, int]:
        """Gathers and scatters of a layer's stream: forward and backward, and in a repeated forward."""
        if self.cfg.parallel.tp == 1:
            return 0, 0
        return (10, 4) if self.cfg.parallel.sequence_parallel else (8, 4)  # a sum is a scatter and a gather

    def _unit(self) -> float:
        """Seconds to gather or scatter the stream of a micro batch over tensor parallel ranks."""
        tp = self.cfg.parallel.tp
        return self.tokens * self.cfg.model.hidden_size * 2 * (tp - 1) / tp / self._speed(tp)

    def _context_parallel(self, layer: LayerLayout) -> float:
        cfg, cp = self.cfg, self.cfg.parallel.cp
        if cp == 1:
            return 0.0
        keys = self.tokens * cp * self.groups * head_dim(cfg.model) * 2 // cfg.parallel.tp  # bytes
        share = 1.0 if layer.is_dense or cfg.parallel.cp_exchange == "gather" else _CP_SPARSE
        speed = self._speed(cfg.parallel.tp * cp) * _CP_LINK / _USED_LINK
        return share * 4 * keys * (cp - 1) / cp / speed  # keys and values, and their gradients

    def _speed(self, ranks: int) -> float:
        """Bytes/s over so many ranks in a row."""
        return _USED_LINK * (self.link if ranks <= GPUS_PER_MACHINE else min(self.link, NETWORK))


def _attention_rates(cfg: PretrainConfig, hardware: Hardware, impl: Implementations, factor: float) -> AttentionRates:
    rates = AttentionRates().dense_by(impl.dense(cfg), cfg.train.deterministic)
    on_hopper = hardware.capability is None or hardware.capability[0] == 9
    if not on_hopper or cfg.attention_backend == "portable" or cfg.train.deterministic or cfg.layout.block_size < 64:
        rates = rates.portable()
    return rates.scaled(factor)


def _caveats(cfg: PretrainConfig, world_size: int, hardware: Hardware) -> list[str]:
    assert hardware.rates is not None
    found = []
    if hardware.rates != gpu_rates(_H100):
        found.append(f"an H100's, scaled by the peak rates of {hardware.name}")
    if cfg.parallel.tp > 2:
        found.append("no parallel.tp above 2 was measured")
    if cfg.parallel.pp > 1:
        found.append("no pipeline was measured")
    if world_size > GPUS_PER_MACHINE:
        found.append(f"machines of {GPUS_PER_MACHINE} GPUs, each with {NETWORK * 8 / 1e9:.0f} Gb/s, are assumed")
    if cfg.data.attention_within_documents:
        found.append("documents are counted as one")
    return found
