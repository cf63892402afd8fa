"""Names what the quality study compares: kinds of attention and training phases."""

import difflib
import re
from dataclasses import dataclass, replace
from functools import lru_cache

from s2train.costs.attention import density
from s2train.errors import ConfigError
from s2train.planning import compose_run, hybrid_layout

# 126M parameters, and a depth that layer strings of period 4, 8 and 16 divide.
MODEL = ("+model=125m_hybrid", "model.num_layers=16")
REFERENCE = "hybrid"  # whose density the numbers of blocks MATCHED give
# a number of blocks in +layout.patterns.LETTER={…} or +layout.kinds.LETTER={…}, computed by `matched_window`
MATCHED = "MATCHED"
_WARM_UP = ",warm_up_steps:200"  # a scorer that learns has dense layers to learn from in these steps
_PARTIAL = "layout.allow_partial_coverage=true"

# A new kind of attention is one entry here: its settings of launch/pretrain.py.
VARIANTS: dict[str, tuple[str, ...]] = {
    "dense": ("layout.layers=D",),
    "hybrid": ("layout.layers=DSSS",),
    "window": ("layout.layers=DWWW", f"+layout.patterns.W={{kind:sliding_window,window:{MATCHED}}}", _PARTIAL),
    "homogeneous": ("layout.layers=DSSS", "schedule=homogeneous", _PARTIAL),
    "hyper": ("layout=hyper_b256", "layout.layers=D8H8"),
    "sparse": ("layout.layers=S",),
    "d1s7": ("layout.layers=D1S7",),
    "d1s15": ("layout.layers=D1S15",),
    "window_sinks": (
        "layout.layers=DWWW",
        f"+layout.patterns.W={{kind:sliding_window,window:{MATCHED},sinks:1}}",
        _PARTIAL,
    ),
    **{
        scorer: (
            "layout.layers=DEEE",
            f"+layout.kinds.E={{kind:block_selection,scorer:{scorer},top_k:{MATCHED}{warm_up}}}",
        )
        for scorer, warm_up in (("moba", ""), ("index", _WARM_UP), ("sea", _WARM_UP))
    },
}
_MATCHED = re.compile(rf"\+layout\.(patterns|kinds)\.([A-Z])=.*\b(\w+):{MATCHED}\b")


@dataclass(frozen=True)
class Phase:
    """Training at one length.

    Attributes:
        length: tokens of a sequence.
        tokens: of this phase.
        after: phase whose last checkpoint it starts from; None: none.
        dense: whether all layers become dense.
    """

    name: str
    length: int
    tokens: int
    after: str | None = None
    dense: bool = False


PHASES = {
    phase.name: phase
    for phase in (
        Phase("16k", 16384, 300_000_000),
        Phase("32k", 32768, 300_000_000),
        Phase("64k", 65536, 20_000_000, after="32k", dense=True),
    )
}
SEEDS = (1, 2)


@dataclass(frozen=True)
class Run:
    """One training run."""

    variant: str
    phase: str = "16k"
    seed: int = SEEDS[0]

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.phase}-seed{self.seed}"

    @property
    def before(self) -> "Run | None":
        """The run whose last checkpoint this one starts from."""
        after = PHASES[self.phase].after
        return None if after is None else replace(self, phase=after)


# The study: two seeds of what is compared first, one of the rest.
RUNS = (
    *(Run(variant, seed=seed) for seed in SEEDS for variant in ("dense", "hybrid", "window", "homogeneous")),
    *(Run(variant) for variant in ("sparse", "d1s7", "d1s15", "window_sinks")),
    *(Run(variant, phase) for phase in ("32k", "64k") for variant in ("hybrid", "window")),
)


def find_run(variant: str, phase: str, seed: int) -> Run:
    """Name a run.

    Raises:
        ConfigError: there is no such variant or phase.
    """
    for setting, value, known in (("variant", variant, VARIANTS), ("phase", phase, PHASES)):
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1, cutoff=0.0)[0]
            raise ConfigError(
                setting, value, "is not in the study", f"Did you mean {near}? There are {', '.join(known)}"
            )
    return Run(variant, phase, seed)


def attention_settings(variant: str, phase: Phase) -> list[str]:
    """Return the variant's settings, with the number of blocks filled in.

    This number gives the reference's density at the phase's length.
    """
    settings = VARIANTS["dense" if phase.dense else variant]
    if not any(MATCHED in setting for setting in settings):
        return list(settings)
    return [setting.replace(MATCHED, str(matched_window(settings, phase.length))) for setting in settings]


@lru_cache
def matched_window(settings: tuple[str, ...], length: int) -> int:
    """Find the number of blocks that matches the reference's density.

    These are blocks of the window, or selected blocks. Their density at `length` comes nearest to the reference's.
    """
    wanted = _wanted_density(length)
    cfg = compose_run([*MODEL, *(setting.replace(MATCHED, "1") for setting in settings)])
    places = [found.groups() for found in map(_MATCHED.match, settings) if found]

    def missed(window: int) -> float:
        for section, letter, name in places:
            getattr(cfg.layout, section)[letter][name] = window
        return density(hybrid_layout(cfg), length) - wanted

    low, high = 1, length // cfg.layout.block_size  # density grows with the window
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if missed(middle) >= 0 else (middle + 1, high)
    return min((low, max(1, low - 1)), key=lambda window: abs(missed(window)))


@lru_cache
def _wanted_density(length: int) -> float:
    return run_density([*MODEL, *VARIANTS[REFERENCE]], length)


def run_density(settings: list[str], length: int) -> float:
    """Kept over causal positions of a model at `length`."""
    return density(hybrid_layout(compose_run(settings)), length)
