"""Interface of a kind of attention, and a layer that has one.

A kind answers for its layers what the rest of the program asks. Every answer is given by the kind itself: there is no
default that stands for dense attention, and a feature that a kind doesn't list is rejected before anything is built.

asked by                          question
layout, pictures, coverage        `heads`: static patterns, or the bound of a data-dependent kind
plan, FLOPs, MFU, stages          `kept_positions`, `counts_exactly`, `weights`, `extra_flops`, `activation_bytes`,
                                  `warm_up_steps`, `warm_up_flops`, `target_bytes`, `reads_dense_layout`, `cpu_bytes`
Megatron                          `core_attention`, `weights`, `columns`
cache while decoding              `LayerLayout.bound`: a key stays as long as a later query may read it
checkpoint, import                `weights`: names, division, what a weights-only start may lack
program at its start              `features`, `check`, `may_change`, `teacher`
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from s2train.attention.features import Feature
from s2train.attention.weights import AttentionShape, Weight
from s2train.config import PretrainConfig
from s2train.errors import ConfigError
from s2train.kernels.layout import BlockLayout
from s2train.kernels.layout_builder import ColumnRule, Rule
from s2train.layouts.counting import kept_positions
from s2train.layouts.patterns import BandedPattern, Dense, LayerContext, Pattern


@dataclass(frozen=True)
class KindContext:
    """What a kind makes a layer's patterns of."""

    layer: LayerContext
    dense_heads: frozenset[int] = frozenset()  # query heads that the schedule wants dense


HeadsOf = Callable[[KindContext], tuple[Pattern, ...]]  # one pattern per query head


@dataclass(frozen=True)
class PairBytes:
    """Memory of a layer on a CPU.

    In bytes for each pair of a query and a key of a head.

    Attributes:
        kept: for the backward pass, by each layer.
        temporary: besides, by one layer at a time.
        is_shared: whether sequences of a micro batch share both, unless documents stay apart.
    """

    kept: int = 0
    temporary: int = 0
    is_shared: bool = False


@dataclass(frozen=True, eq=False)
class AttentionKind(ABC):
    """A kind of attention with its settings.

    A subclass sets the class attributes and answers the abstract methods. Kinds are equal if class and letter are, and
    settings, if the data choose what is read; the patterns of static kinds say everything.

    Class attributes:
        name: in `layout.kinds.LETTER={kind: NAME}`, and at the head of its columns.
        settings_type: a frozen dataclass of plain types; its fields are the settings.
        core_attention: "module:Class", a `CausalCoreAttention`, imported to build a layer.
        data_dependent: whether the data choose which keys are read. If not, the patterns are read in full.
        counts_exactly: whether `kept_positions` are exact; else expected, which plans say.
        decodes_as_trained: whether attention over a cache is that of training. If not, losses are computed without a
            cache.
        features: what it supports. All others are rejected.
        may_change: settings that a resumed run may have otherwise, as `checkpoint.allow_changes` permits.

    Attributes:
        letter: in `layout.layers`.
        setting: where its settings come from, for errors, such as layout.kinds.E.
    """

    name: ClassVar[str]
    settings_type: ClassVar[type]
    core_attention: ClassVar[str]
    data_dependent: ClassVar[bool]
    counts_exactly: ClassVar[bool]
    decodes_as_trained: ClassVar[bool] = True
    features: ClassVar[frozenset[Feature]] = frozenset()
    may_change: ClassVar[frozenset[str]] = frozenset()

    letter: str
    settings: Any
    setting: str

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AttentionKind) or type(self) is not type(other):
            return False
        return self.letter == other.letter and (not self.data_dependent or self.settings == other.settings)

    def __hash__(self) -> int:
        return hash((type(self), self.letter))

    @property
    def label(self) -> str:
        """The name in messages."""
        return self.name

    @property
    def pattern_setting(self) -> str:
        """Where the patterns of its heads come from, for errors."""
        return self.setting

    @property
    def names_heads(self) -> bool:
        """Whether its settings name each head's pattern.

        If so, heads must not change places.
        """
        return False

    def error(self, name: str, problem: str, remedy: str) -> ConfigError:
        """The error about one of its settings."""
        return ConfigError(f"{self.setting}.{name}", getattr(self.settings, name), problem, remedy)

    @property
    def teacher(self) -> str | None:
        """The run folder or checkpoint that its layers learn from.

        It is of a dense model. None: they learn without one.
        """
        return None

    @abstractmethod
    def heads(self) -> HeadsOf:
        """Check the settings by themselves; return a function that makes heads' patterns.

        The function gives each query head of a layer its pattern. Of a static kind, the pattern is what the head reads.
        Of a data-dependent one, it is a bound: no query ever reads a key outside of it.

        Raises:
            ConfigError: a setting that can't be.
        """

    def check(self, cfg: PretrainConfig) -> None:  # noqa: B027 (many have nothing to check)
        """Check the settings against those of the run.

        Raises:
            ConfigError: two that don't go together.
        """

    @abstractmethod
    def weights(self, shape: AttentionShape) -> tuple[Weight, ...]:
        """Weights of a layer besides its projections."""

    @abstractmethod
    def kept_positions(self, layer: "LayerLayout", seq_length: int) -> tuple[float, ...]:
        """Count the token pairs that each head reads.

        They are causal (query, key) pairs of one sequence; their number is exact or expected.
        """

    @abstractmethod
    def extra_flops(self, layer: "LayerLayout", seq_length: int, shape: AttentionShape) -> float:
        """Count forward FLOPs of one sequence besides Q Kᵀ and P V.

        The backward pass counts as twice that.
        """

    def warm_up_steps(self) -> int:
        """Return the number of warm-up steps; 0: no warm-up.

        In these first steps of a run, the kind's layers compute something else, which costs `warm_up_flops`.
        """
        return 0

    def warm_up_flops(self, layer: "LayerLayout", seq_length: int, shape: AttentionShape) -> float:
        """Count forward FLOPs of one sequence's attention in the warm-up.

        The count is the total, to which nothing is added. The backward pass counts as twice that.
        """
        raise NotImplementedError(f"{self.name} has no warm-up")

    def reads_dense_layout(self, cfg: PretrainConfig) -> bool:
        """Return whether its layers also use a layout that keeps every block."""
        return False

    @abstractmethod
    def activation_bytes(self, layer: "LayerLayout", seq_length: int, shape: AttentionShape, element_size: int) -> int:
        """Count the extra bytes kept for one sequence's backward pass.

        They are summed over all heads, without q, k, v, output and log-sum-exp.
        """

    @abstractmethod
    def cpu_bytes(self, layer: "LayerLayout", element_size: int) -> PairBytes:
        """Return what attention that is not tiled takes on a CPU.

        It is measured: what a process grows by with the square of the length.
        """

    def target_bytes(self, layer: "LayerLayout", seq_length: int, shape: AttentionShape) -> int:
        """Count the bytes that a teacher gives a layer for one sequence.

        They are summed over all KV heads.
        """
        return 0

    @abstractmethod
    def columns(self) -> Mapping[str, float | None]:
        """Name the auxiliary losses, with their weights, and other values to log.

        Other values have None in place of a weight. The core attention passes each loss or value to `add_loss` or
        `record`; the run logs it as `{kind}_{name}`.
        """


class StaticKind(AttentionKind):
    """A kind whose heads read fixed patterns.

    It adds nothing to the layer: no weights, FLOPs, activations or logged values.
    """

    data_dependent = False
    counts_exactly = True

    def weights(self, shape: AttentionShape) -> tuple[Weight, ...]:
        return ()

    def kept_positions(self, layer: "LayerLayout", seq_length: int) -> tuple[float, ...]:
        kept = {pattern: kept_positions(pattern, layer.block_size, seq_length) for pattern in set(layer.heads)}
        return tuple(kept[head] for head in layer.heads)

    def extra_flops(self, layer: "LayerLayout", seq_length: int, shape: AttentionShape) -> float:
        return 0

    def activation_bytes(self, layer: "LayerLayout", seq_length: int, shape: AttentionShape, element_size: int) -> int:
        return 0

    def cpu_bytes(self, layer: "LayerLayout", element_size: int) -> PairBytes:
        """A mask of numbers, and one of bools before; none if dense."""
        return PairBytes() if layer.is_dense else PairBytes(element_size, 2, is_shared=True)

    def columns(self) -> Mapping[str, float | None]:
        return {}


class DataDependentKind(AttentionKind):
    """A kind where the data choose which keys are read.

    They choose among all causal keys, unless `heads` returns narrower bounds.
    """

    data_dependent = True

    @abstractmethod
    def check_settings(self) -> None:
        """Check the settings by themselves.

        Raises:
            ConfigError: the first setting that can't be, as `error` makes it.
        """

    def heads(self) -> HeadsOf:
        self.check_settings()
        return lambda context: (Dense(),) * context.layer.num_heads


@dataclass(frozen=True)
class LayerLayout:
    """One layer: its kind, and what its query heads read at most."""

    kind: AttentionKind
    bound: tuple[Pattern, ...]  # one per query head
    block_size: int  # tokens

    @property
    def is_static(self) -> bool:
        """Whether each head reads its pattern in full, whatever the data."""
        return not self.kind.data_dependent

    @property
    def heads(self) -> tuple[Pattern, ...]:
        """What each query head reads.

        Raises:
            TypeError: the data choose it. Ask the kind, or reject it before.
        """
        if not self.is_static:
            raise TypeError(f"layers of kind {self.kind.name} have no fixed patterns: the data choose what they read")
        return self.bound

    @property
    def is_dense(self) -> bool:
        """Whether each head reads every causal key, whatever the data."""
        return self.is_static and all(isinstance(head, Dense) for head in self.bound)

    def num_blocks(self, seq_length: int) -> int:
        """Blocks of a sequence; the last may be partial."""
        return -(-seq_length // self.block_size)

    def block_layout(
        self, seq_length: int, *, heads: slice | None = None, device: torch.device | str = "cpu"
    ) -> BlockLayout:
        """Return the kept blocks over `seq_length` tokens, on `device`.

        Args:
            heads: a slice of the query heads; None: all.
        """
        patterns = self.heads if heads is None else self.heads[heads]
        index = {pattern: number for number, pattern in enumerate(dict.fromkeys(patterns))}
        num_blocks = self.num_blocks(seq_length)
        return BlockLayout.from_rule(
            [_rule(pattern, num_blocks) for pattern in index],
            [index[pattern] for pattern in patterns],
            self.block_size,
            num_blocks,
            num_blocks,
            device=device,
        )


def _rule(pattern: Pattern, num_blocks: int) -> Rule:
    """Return the pattern's rule for `BlockLayout.from_rule`.

    It is in closed form where the pattern is a whole window and columns before it.
    """
    if isinstance(pattern, BandedPattern) and len(pattern.limits) <= 1:
        window = pattern.limits[0] if pattern.limits else 1  # the diagonal is always kept
        if window == 1 or bool(pattern.columns(0, torch.arange(num_blocks)).all()):
            return ColumnRule(window, partial(pattern.columns, len(pattern.limits)))
    return pattern.keep


def lacking(layers: Sequence[LayerLayout], feature: Feature) -> list[AttentionKind]:
    """The kinds of these layers that don't support a feature, each once."""
    kinds = dict.fromkeys(layer.kind for layer in layers)
    return [kind for kind in kinds if feature not in kind.features]
