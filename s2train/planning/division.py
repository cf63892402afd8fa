"""Searches the divisions of a model over GPUs: `plan.gpus=64 plan.device=h100-80gb`.

Tries every tensor, pipeline and context parallel size that divides the GPUs, with micro batches of powers of two and
each kind of recomputation. Tensor parallel ranks stay within a machine. Step time and memory are those of the plan of
such a run; nothing is allocated.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from s2train.attention.coverage import check_coverage
from s2train.attention.hybrid import HybridLayout
from s2train.config import PretrainConfig
from s2train.costs.flops import token_flops
from s2train.costs.implementations import Implementations
from s2train.costs.memory import Memory, rank_memory
from s2train.costs.rank_share import data_parallel
from s2train.costs.stages import Stages, layer_flops, pipeline_stages
from s2train.costs.step_time import GPUS_PER_MACHINE, Prediction, predict_step
from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError, as_typed
from s2train.planning.advice import RECOMPUTE, ROOM
from s2train.planning.checks import check_layout
from s2train.planning.plan import layouts_nbytes
from s2train.validation.division import check_division
from s2train.validation.transformer_engine import check_fp8_settings


@dataclass(frozen=True)
class Candidate:
    """A division, its predicted step, and the memory of its fullest rank."""

    cfg: PretrainConfig
    gpus: int
    memory: Memory
    prediction: Prediction

    @property
    def seconds(self) -> float:
        return self.prediction.time.total

    @property
    def dp(self) -> int:
        return data_parallel(self.cfg, self.gpus)

    @property
    def settings(self) -> tuple[str, ...]:
        """The division as settings of a command line."""
        parallel, train = self.cfg.parallel, self.cfg.train
        named = {
            "parallel.tp": parallel.tp,
            "parallel.pp": parallel.pp,
            "parallel.cp": parallel.cp,
            "parallel.sequence_parallel": parallel.sequence_parallel,
            "train.micro_batch_size": train.micro_batch_size,
            "train.recompute": train.recompute,
        }
        if parallel.pp > 1:
            named |= {"parallel.vpp": None, "parallel.pipeline_split": parallel.pipeline_split}
        return tuple(f"{name}={as_typed(value)}" for name, value in named.items())

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Tensor, pipeline and context parallel ranks."""
        return self.cfg.parallel.tp, self.cfg.parallel.pp, self.cfg.parallel.cp


@dataclass(frozen=True)
class Search:
    """What was tried.

    Attributes:
        room: bytes of a GPU that a division may use.
        fitting: best first.
        too_large: divisions that need more than `room`, fastest first.
        rejected: why divisions were not planned, in the order of the search.
    """

    cfg: PretrainConfig
    gpus: int
    hardware: Hardware
    room: int
    fitting: tuple[Candidate, ...]
    too_large: tuple[Candidate, ...]
    rejected: tuple[ConfigError, ...]


def search(cfg: PretrainConfig, hybrid: HybridLayout, gpus: int, hardware: Hardware) -> Search:
    """Plan every division of the model over `gpus` GPUs like `hardware`.

    `cfg` must have passed the checks of its values.

    Raises:
        ConfigError: no head sees some far blocks, and `layout.allow_partial_coverage` is off.
    """
    check_coverage(hybrid, cfg.train.seq_length, cfg.layout)
    planner = _Planner(cfg, hybrid, gpus, hardware)
    room, found = int(ROOM * hardware.memory), list[Candidate]()
    rejected = []
    for divided in _divisions(cfg, gpus):
        micro = 1
        while True:
            planned = []
            for candidate in _recomputations(divided, micro):
                try:
                    planned.append(planner.plan(candidate))
                except ConfigError as error:
                    rejected.append(error)
            found += planned
            # A larger micro batch needs more memory, and must divide the batch too.
            if not any(candidate.memory.total <= room for candidate in planned):
                break
            micro *= 2
    found = _best_splits(sorted(found, key=lambda candidate: (candidate.seconds, candidate.memory.total)), room)
    return Search(
        cfg=cfg,
        gpus=gpus,
        hardware=hardware,
        room=room,
        fitting=tuple(candidate for candidate in found if candidate.memory.total <= room),
        too_large=tuple(candidate for candidate in found if candidate.memory.total > room),
        rejected=tuple(rejected),
    )


def can_divide(cfg: PretrainConfig, hybrid: HybridLayout, gpus: int, hardware: Hardware) -> bool:
    """Return whether any division over `gpus` GPUs passes the checks.

    The division may need any amount of memory.
    """
    train = cfg.train
    dividing = ((tp, pp, cp) for tp, pp, cp in _sizes(cfg, gpus) if train.seq_length % cp == 0)
    if not any(train.global_batch_size % (gpus // (tp * pp * cp)) == 0 for tp, pp, cp in dividing):
        return False  # as `_check` would find, a thousand times slower
    for divided in _divisions(cfg, gpus):
        for candidate in _recomputations(divided, micro=1):
            with suppress(ConfigError):
                _check(candidate, hybrid, gpus, hardware)
                return True
    return False


def _check(cfg: PretrainConfig, hybrid: HybridLayout, gpus: int, hardware: Hardware) -> None:
    check_division(cfg, gpus)
    check_layout(cfg, hybrid, hardware)
    if cfg.fp8 != "none":
        check_fp8_settings(cfg)


def _divisions(cfg: PretrainConfig, gpus: int) -> Iterator[PretrainConfig]:
    """Yield the model divided by each tp, pp and cp.

    Each pipeline is split in both ways, evenly and by cost.
    """
    for tp, pp, cp in _sizes(cfg, gpus):
        for split in ("even", "cost") if pp > 1 else (cfg.parallel.pipeline_split,):
            divided = replace(cfg.parallel, tp=tp, pp=pp, cp=cp, vpp=None, pipeline_split=split)
            yield replace(cfg, parallel=replace(divided, sequence_parallel=tp > 1))


def _sizes(cfg: PretrainConfig, gpus: int) -> Iterator[tuple[int, int, int]]:
    """Yield every tp, pp and cp that divide `gpus`.

    Each group of tensor parallel ranks is on one machine.
    """
    divisors = [size for size in range(1, gpus + 1) if gpus % size == 0]
    of_machine = min(gpus, GPUS_PER_MACHINE)
    for tp in (size for size in divisors if of_machine % size == 0):
        for pp in (size for size in divisors if gpus % (tp * size) == 0 and size <= cfg.model.num_layers):
            for cp in (size for size in divisors if gpus % (tp * pp * size) == 0):
                yield tp, pp, cp


def _recomputations(cfg: PretrainConfig, micro: int) -> Iterator[PretrainConfig]:
    for recompute in RECOMPUTE:
        train = replace(cfg.train, micro_batch_size=micro, recompute=recompute)
        yield replace(cfg, train=train)


def _best_splits(candidates: list[Candidate], room: int) -> list[Candidate]:
    """Keep one way to split each pipeline.

    It is the fastest that fits; if none fits, the fastest. The candidates are sorted by time.
    """
    kept: dict[tuple[object, ...], Candidate] = {}
    for candidate in candidates:
        train = candidate.cfg.train
        key = (*candidate.sizes, train.micro_batch_size, train.recompute)
        if key not in kept or kept[key].memory.total > room >= candidate.memory.total:
            kept[key] = candidate
    return sorted(kept.values(), key=lambda candidate: (candidate.seconds, candidate.memory.total))


class _Planner:
    """Plans divisions of one model, and keeps what they share."""

    def __init__(self, cfg: PretrainConfig, hybrid: HybridLayout, gpus: int, hardware: Hardware) -> None:
        self.hybrid, self.gpus, self.hardware = hybrid, gpus, hardware
        self.impl = Implementations.of(cfg, hardware)
        self.flops = token_flops(cfg.model, hybrid, cfg.train.seq_length).sparse
        self.stages: dict[tuple[int, str], Stages] = {}
        self.layouts: dict[bool, int] = {}  # bytes, by whether context parallel ranks have two
        self.costs = layer_flops(cfg.model, hybrid, cfg.train.seq_length)

    def plan(self, cfg: PretrainConfig) -> Candidate:
        """Plan one division.

        Raises:
            ConfigError: a run of it would be rejected.
        """
        _check(cfg, self.hybrid, self.gpus, self.hardware)
        split, crosses = (cfg.parallel.pp, cfg.parallel.pipeline_split), cfg.parallel.cp > 1
        if split not in self.stages:
            self.stages[split] = pipeline_stages(cfg.model, cfg.parallel, self.costs)
        if crosses not in self.layouts:
            self.layouts[crosses] = layouts_nbytes(cfg, self.hybrid, self.impl)
        stages, layouts = self.stages[split], self.layouts[crosses]
        memory = rank_memory(cfg, self.hybrid, self.gpus, stages, layouts, self.hardware.kind, self.impl)
        found = predict_step(cfg, self.hybrid, stages, self.gpus, self.hardware, self.flops, self.impl)
        assert found is not None  # `propose` has checked what a prediction needs
        return Candidate(cfg, self.gpus, memory, found)
