"""Computes a run's parameters, FLOPs and memory from its configuration alone."""

from dataclasses import dataclass, replace

from s2train.attention.coverage import CoverageReport, check_coverage
from s2train.attention.hybrid import HybridLayout, dense_layer
from s2train.attention.teacher import TeacherSetting, teacher_setting
from s2train.config import PretrainConfig
from s2train.costs.attention import density, layout_nbytes, rank_spread
from s2train.costs.exchange import LayerExchange, layer_exchanges
from s2train.costs.flops import TokenFlops, teacher_flops, token_flops
from s2train.costs.implementations import Implementations
from s2train.costs.memory import Memory
from s2train.costs.parameters import stage_parameters, total_parameters
from s2train.costs.phases import Phase, phases
from s2train.costs.rank_share import data_parallel, micro_batches
from s2train.costs.stages import Balance, balance, layer_flops, pipeline_stages
from s2train.costs.step_time import Prediction, predict_step
from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.planning.advice import ROOM, memory_advice
from s2train.planning.layout_summary import LetterSummary, summarise
from s2train.planning.memory_budget import MemoryBudget
from s2train.planning.remedies import memory_remedy
from s2train.validation.overlap import check_overlap


@dataclass(frozen=True)
class Plan:
    """The cost of a run on `world_size` ranks like `hardware`."""

    cfg: PretrainConfig
    world_size: int
    hardware: Hardware
    letters: str  # one per layer
    density: float  # of the whole model; 1: dense
    sparse_density: float  # mean over sparse layers; 1 if there are none
    sparse_letters: tuple[LetterSummary, ...]
    counts_exactly: bool  # densities and FLOPs; else some are expected ones
    coverage: CoverageReport
    parameters: int
    rank_parameters: int  # on the fullest pipeline stage
    flops: TokenFlops
    phases: tuple[Phase, ...]  # of the run: warm-ups, a frozen trunk; one alone if nothing differs
    teacher: TeacherSetting | None
    teacher_flops: float  # per token, in every phase
    tp_spread: float  # busiest tensor parallel rank over the mean, minus 1, in the most uneven layer
    exchanges: tuple[LayerExchange, ...]  # of keys and values between context parallel ranks
    pipeline: Balance  # of the configured stages
    pipeline_by_cost: Balance  # with parallel.pipeline_split=cost
    memory: Memory  # of the fullest rank
    prediction: Prediction | None  # step time; None if nothing was measured for this case
    with_overlap: Prediction | None  # with parallel.tp_comm_overlap; None if the run has it, or can't
    remedy: str | None  # settings that fit, if this plan doesn't
    advice: str | None  # faster settings that also fit, if this plan fits

    @property
    def data_parallel(self) -> int:
        return data_parallel(self.cfg, self.world_size)

    @property
    def micro_batches(self) -> int:
        return micro_batches(self.cfg, self.world_size)

    @property
    def fits(self) -> bool:
        return self.remedy is None

    @property
    def fits_with_room(self) -> bool:
        """Whether it needs no more than `ROOM` of the memory."""
        return self.memory.total <= ROOM * self.hardware.memory


def make_plan(cfg: PretrainConfig, hybrid: HybridLayout, world_size: int, hardware: Hardware) -> Plan:
    """Compute the plan without building anything; `cfg` has passed `check_division` for `world_size`.

    Raises:
        ConfigError: no head sees some far blocks, and `layout.allow_partial_coverage` is off.
    """
    seq_length = cfg.train.seq_length
    impl = Implementations.of(cfg, hardware)
    costs = layer_flops(cfg.model, hybrid, seq_length)
    stages = pipeline_stages(cfg.model, cfg.parallel, costs)
    by_cost = pipeline_stages(cfg.model, replace(cfg.parallel, pipeline_split="cost"), costs)
    budget = MemoryBudget(hybrid, hardware, costs, layouts_nbytes(cfg, hybrid, impl), impl)
    memory = budget.memory(cfg, world_size)
    fits = memory.total <= hardware.memory
    flops = token_flops(cfg.model, hybrid, seq_length)
    sparse = [layer for layer in hybrid.layers if not layer.is_dense]
    densities = {layer: density(layer, seq_length) for layer in set(sparse)}
    overlapped = _overlapped(cfg, world_size, hardware)

    def predicted(run: PretrainConfig) -> Prediction | None:
        return predict_step(run, hybrid, stages, world_size, hardware, flops.sparse, impl)

    return Plan(
        cfg=cfg,
        world_size=world_size,
        hardware=hardware,
        letters=hybrid.letters,
        density=density(hybrid, seq_length),
        sparse_density=sum(densities[layer] for layer in sparse) / len(sparse) if sparse else 1.0,
        sparse_letters=summarise(hybrid, seq_length),
        counts_exactly=all(layer.kind.counts_exactly for layer in hybrid.layers),
        coverage=check_coverage(hybrid, seq_length, cfg.layout),
        parameters=total_parameters(cfg.model, hybrid.layers),
        rank_parameters=max(
            stage_parameters(cfg.model, cfg.parallel, stage, sum(stages.layers_of_rank(hybrid, stage), ()))
            for stage in range(cfg.parallel.pp)
        ),
        flops=flops,
        phases=phases(cfg, hybrid),
        teacher=teacher_setting(hybrid.layers),
        teacher_flops=teacher_flops(cfg.model, hybrid, seq_length),
        tp_spread=max(rank_spread(layer, seq_length, cfg.parallel.tp) for layer in set(hybrid.layers)),
        exchanges=layer_exchanges(hybrid.layers, hybrid.num_query_groups, seq_length, cfg.parallel),
        pipeline=balance(stages, costs, micro_batches(cfg, world_size)),
        pipeline_by_cost=balance(by_cost, costs, micro_batches(cfg, world_size)),
        memory=memory,
        prediction=predicted(cfg),
        with_overlap=None if overlapped is None else predicted(overlapped),
        remedy=None if fits else memory_remedy(cfg, world_size, budget),
        advice=memory_advice(cfg, world_size, budget) if fits else None,
    )


def _overlapped(cfg: PretrainConfig, world_size: int, hardware: Hardware) -> PretrainConfig | None:
    """Return the configuration with `parallel.tp_comm_overlap`; None if it has it, or can't."""
    if cfg.parallel.tp == 1 or cfg.parallel.tp_comm_overlap:
        return None
    found = replace(cfg, parallel=replace(cfg.parallel, tp_comm_overlap=True))
    try:
        check_overlap(found, world_size, hardware)
    except ConfigError:
        return None
    return found


def layouts_nbytes(cfg: PretrainConfig, hybrid: HybridLayout, impl: Implementations) -> int:
    """Return the largest size in bytes of a rank's block layouts.

    Counts one layout per distinct static layer, with all heads; dense layers make theirs for the sparse op, and for
    attention within documents. Kinds that also compute dense attention, such as in a warm-up, share the dense layers'.
    Under context parallel a rank has two, one for each of its chunks of the sequence.
    """
    dense_too = impl.dense(cfg) == "s2train" or cfg.data.attention_within_documents
    distinct = {layer for layer in hybrid.layers if layer.is_static and (dense_too or not layer.is_dense)}
    if any(layer.kind.reads_dense_layout(cfg) for layer in hybrid.layers):
        distinct.add(dense_layer(cfg.model.num_attention_heads, cfg.layout.block_size))
    chunks = 2 if cfg.parallel.cp > 1 else 1
    return chunks * sum(layout_nbytes(layer, cfg.train.seq_length) for layer in distinct)
