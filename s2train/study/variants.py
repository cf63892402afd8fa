"""Names what the quality study compares: kinds of attention and training phases."""

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache

from s2train.costs.attention import density
from s2train.errors import ConfigError
from s2train.planning import compose_run, hybrid_layout

# 126M parameters, and a depth that layer strings of period 4, 8 and 16 divide.
MODEL = ("+model=125m_hybrid", "model.num_layers=16")
MODEL_40M = (
    "+model=125m_hybrid",
    "model.num_layers=8",
    "model.hidden_size=512",
    "model.ffn_hidden_size=1408",
    "model.num_attention_heads=8",
    "model.num_query_groups=4",
)
# 5M parameters, most of them the vocabulary's; learns on a CPU.
MODEL_REHEARSAL = ("+model=tiny_hybrid", "model.vocab_size=32768")
REFERENCE = "hybrid"  # whose density the numbers of blocks MATCHED give
# a number of blocks in +layout.patterns.LETTER={…} or +layout.kinds.LETTER={…}, computed by `matched_window`
MATCHED = "MATCHED"
WARM_UP = "WARM_UP"  # the phase's `scorer_warm_up`
_LEARNS = f",warm_up_steps:{WARM_UP}"
_PARTIAL = "layout.allow_partial_coverage=true"

# A new kind of attention is one entry here: its settings of launch/pretrain.py.
VARIANTS: dict[str, tuple[str, ...]] = {
    "dense": ("layout.layers=D",),
    "hybrid": ("layout.layers=DSSS",),
    "window": ("layout.layers=DWWW", f"+layout.patterns.W={{kind:sliding_window,window:{MATCHED}}}", _PARTIAL),
    "homogeneous": ("layout.layers=DSSS", "schedule=homogeneous", _PARTIAL),
    "grouped": ("layout.layers=DSSS", "schedule=grouped", _PARTIAL),  # heads differ, but don't see all blocks together
    # more local blocks, and stripes farther apart: by 12 blocks, as MODEL has 12 heads, which together see all blocks
    "wide": ("layout.layers=DWWW", f"+layout.patterns.W={{kind:local_vertical,local:{MATCHED},stride:12}}"),
    # the window's reach nearby, and the stripes' far away
    "alternating": ("layout.layers=DWSW", f"+layout.patterns.W={{kind:sliding_window,window:{MATCHED}}}", _PARTIAL),
    "hyper": ("layout=hyper_b256", "layout.layers=DHHH"),  # the hybrid's number of dense layers, near its density
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
        for scorer, warm_up in (("moba", ""), ("index", _LEARNS), ("sea", _LEARNS))
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
        from_dense: whether it starts from the weights alone of the dense run of `after`, at step 1 with a new
            optimizer; scorers that learn do so alone in their warm-up.
        needles: whether it trains on needle documents, and starts from the weights alone of the variant's run of
            `after`, at step 1 with a new optimizer.
        lr_factor: of the recipe's learning rate.
        model: settings of the model.
        held_out_tokens: of each evaluation of the held-out loss.
        scorer_warm_up: first steps, in which layers are dense whose scorer learns.
        about: what its title says beside the length.
    """

    name: str
    length: int
    tokens: int
    after: str | None = None
    dense: bool = False
    from_dense: bool = False
    needles: bool = False
    lr_factor: float = 1.0
    model: tuple[str, ...] = MODEL
    held_out_tokens: int = 1 << 20
    scorer_warm_up: int = 200
    about: str = ""

    @property
    def weights_only(self) -> bool:
        """Whether it starts at step 1 from weights alone."""
        return self.from_dense or self.needles

    @property
    def is_after_decay(self) -> bool:
        """Whether it continues a run past its schedule's end.

        Its learning rate is then the lowest one.
        """
        return self.after is not None and not self.weights_only

    @property
    def title(self) -> str:
        """Title of its section and its panel."""
        return f"{self.length:,} tokens" + (f", {self.about}" if self.about else "")


PHASES = {
    phase.name: phase
    for phase in (
        Phase("16k", 16384, 300_000_000),
        Phase("32k", 32768, 300_000_000),
        Phase("64k", 65536, 20_000_000, after="32k", dense=True),
        Phase(
            "16k-needles",
            16384,
            20_000_000,
            after="16k",
            needles=True,
            lr_factor=0.5,
            scorer_warm_up=0,
            about="continued on needle documents",
        ),
        Phase(
            "16k-from-dense",
            16384,
            20_000_000,
            after="16k",
            from_dense=True,
            lr_factor=0.5,
            scorer_warm_up=50,
            about="started from dense weights",
        ),
        Phase("16k-40m", 16384, 65_536_000, model=MODEL_40M, about="40M parameters"),
        Phase(
            "16k-40m-from-dense",
            16384,
            16_384_000,
            after="16k-40m",
            from_dense=True,
            model=MODEL_40M,
            scorer_warm_up=100,
            about="40M parameters, started from dense weights",
        ),
        Phase(
            "rehearsal",
            256,
            1 << 17,
            model=MODEL_REHEARSAL,
            held_out_tokens=1 << 13,
            about="a rehearsal, which compares nothing",
        ),
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
        phase = PHASES[self.phase]
        if phase.after is None:
            return None
        return replace(self, phase=phase.after, variant="dense" if phase.from_dense else self.variant)


# The study: two seeds of what is compared first, one of the rest, all continued on needles; kinds started from weights
# of dense runs; then two seeds of every kind on a smaller model.
_AT_16K = (
    *(Run(variant, seed=seed) for seed in SEEDS for variant in ("dense", "hybrid", "window", "homogeneous")),
    *(Run(variant) for variant in ("sparse", "d1s7", "d1s15", "window_sinks")),
)
RUNS = (
    *_AT_16K,
    *(Run(variant, phase) for phase in ("32k", "64k") for variant in ("hybrid", "window")),
    *(replace(run, phase="16k-needles") for run in _AT_16K),
    *(Run(variant, "16k-from-dense", seed) for seed in SEEDS for variant in ("dense", "hybrid", "window", "moba")),
    *(
        Run(variant, "16k-40m", seed)
        for seed in SEEDS
        for variant in ("dense", "hybrid", "window", "homogeneous", "moba", "index", "sea", "hyper")
    ),
    *(Run(variant, "16k-40m-from-dense", seed) for seed in SEEDS for variant in ("dense", "index", "hyper")),
)
# Every program of the study in minutes on a CPU, before it takes a GPU.
REHEARSAL = (Run("dense", "rehearsal"), Run("hybrid", "rehearsal"))


def find_run(variant: str, phase: str, seed: int) -> Run:
    """Name a run.

    Raises:
        ConfigError: there is no such variant or phase.
    """
    _check_known("variant", variant, VARIANTS)
    return Run(variant, find_phase(phase).name, seed)


def find_phase(name: str) -> Phase:
    """Find a phase by its name.

    Raises:
        ConfigError: there is no such phase.
    """
    _check_known("phase", name, PHASES)
    return PHASES[name]


def _check_known(setting: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1, cutoff=0.0)[0]
        raise ConfigError(setting, value, "is not in the study", f"Did you mean {near}? There are {', '.join(known)}")


def attention_settings(variant: str, phase: Phase) -> list[str]:
    """Return the variant's settings, with block counts and warm-up filled in.

    This number of blocks gives the reference's density at the phase's length.
    """
    settings = tuple(
        setting.replace(WARM_UP, str(phase.scorer_warm_up)) for setting in VARIANTS["dense" if phase.dense else variant]
    )
    if not any(MATCHED in setting for setting in settings):
        return list(settings)
    blocks = matched_window(settings, phase.length, phase.model)
    return [setting.replace(MATCHED, str(blocks)) for setting in settings]


def has_warm_up(run: Run) -> bool:
    """Whether layers are dense while their scorer learns."""
    phase = PHASES[run.phase]
    return not phase.dense and phase.scorer_warm_up > 0 and any(WARM_UP in setting for setting in VARIANTS[run.variant])


@lru_cache
def matched_window(settings: tuple[str, ...], length: int, model: tuple[str, ...] = MODEL) -> int:
    """Find the number of blocks that matches the reference's density.

    These are blocks of the window, local blocks or selected ones. Their density at `length` comes nearest to the
    reference's.
    """
    wanted = _wanted_density(length, model)
    cfg = compose_run([*model, *(setting.replace(MATCHED, "1") for setting in settings)])
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
def _wanted_density(length: int, model: tuple[str, ...]) -> float:
    return run_density([*model, *VARIANTS[REFERENCE]], length)


def run_density(settings: list[str], length: int) -> float:
    """Return kept over causal positions of a model at `length`.

    Positions are expected ones where the data choose.
    """
    return density(hybrid_layout(compose_run(settings)), length)


def counts_exactly(settings: list[str]) -> bool:
    """Return whether a model's density is exact, not an expected one."""
    return all(layer.kind.counts_exactly for layer in hybrid_layout(compose_run(settings)).layers)
