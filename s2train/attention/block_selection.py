"""Attention to key blocks that a scorer selects.

MoBA, an index branch and SEA differ in the scorer alone. A query block reads its own block, the ones before it, the
first ones, and the best of the complete blocks between: one list for each KV head. The block's own queries are never
pooled for its scores: otherwise later tokens would choose what earlier ones read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from s2train.attention.features import Feature
from s2train.attention.kind import DataDependentKind, LayerLayout, PairBytes
from s2train.attention.selection.index import IndexScorer
from s2train.attention.selection.lists import Budget
from s2train.attention.selection.mixing import mixing_bytes, mixing_flops, mixing_weights
from s2train.attention.selection.moba import MobaScorer
from s2train.attention.selection.scorer import Scorer
from s2train.attention.selection.sea import SeaScorer
from s2train.attention.weights import AttentionShape, Weight
from s2train.config import PretrainConfig
from s2train.errors import from_to

PREVIOUS_BLOCK, FIRST_TOKEN = QUERIES = ("previous_block", "first_token")
SCORERS = ("moba", "index", "sea")
_LEARNING = ("loss_weight", "trunk_gradient", "teacher")
_READ_BY: dict[str, tuple[str, ...]] = {
    "moba": (),
    "index": ("index_dim", *_LEARNING),
    "sea": ("features", "channels", "mse_weight", *_LEARNING),
}


@dataclass(frozen=True)
class BlockSelectionSettings:
    """Settings of the kind; units are blocks, if not said otherwise."""

    scorer: str = "index"  # moba (mean of keys, no weights), index (trained index branch), sea (features and CNN)
    top_k: int | None = None  # best earlier blocks that a query block reads, beside those that are always kept
    share: float | None = None  # in place of top_k: this share of the candidates, rounded up
    window: int = 2  # the last blocks, with the query's own, always kept; at least 2
    sinks: int = 1  # the first blocks, always kept
    queries: str = PREVIOUS_BLOCK  # that choose for a block: the mean of the block before, or its first_token
    warm_up_steps: int = 0  # first steps of the run, with dense attention, whose probabilities the scorer learns
    # query tokens of a sequence, after the warm-up, whose probability over all blocks is computed: a scorer learns from
    # it, and it gives the logged recall; for moba, which doesn't learn, in steps that log alone
    sampled_rows: int = 16
    loss_weight: float = 1.0  # of the KL divergence of scorers that learn
    mse_weight: float = 1.0  # of SEA's squared error
    trunk_gradient: bool = False  # whether these losses also train queries and keys
    # run folder or checkpoint of a frozen dense model, whose probabilities a scorer learns; null: the layer's own
    teacher: str | None = None
    index_dim: int = 32  # of the index branch, for each head
    features: int = 32  # of SEA, for each KV head
    channels: int = 16  # of SEA's CNN, for each KV head
    # whether the output is mixed with the mean of all values so far, by a gate of each token and head, as SEA does
    mix_mean: bool = False


class BlockSelectionKind(DataDependentKind):
    """Selects the top-k earlier key blocks by score.

    Candidates are blocks that are complete before the query's block begins.
    """

    name = "block_selection"
    settings_type = BlockSelectionSettings
    core_attention = "s2train.megatron.block_selection:BlockSelectionCoreAttention"
    counts_exactly = True
    features = frozenset(
        {
            Feature.TENSOR_PARALLEL,
            Feature.SEQUENCE_PARALLEL,
            Feature.PIPELINE_PARALLEL,
            Feature.CONTEXT_PARALLEL,
            Feature.RECOMPUTATION,
            Feature.DETERMINISTIC,
            Feature.DECODING,
            Feature.TRANSFORMER_ENGINE,
        }
    )
    may_change = frozenset(
        {
            "top_k", "share", "window", "sinks", "queries", "warm_up_steps", "sampled_rows", "loss_weight",
            "mse_weight", "trunk_gradient", "teacher",
        }
    )  # fmt: skip

    settings: BlockSelectionSettings

    @property
    def label(self) -> str:
        return f"{self.settings.scorer} block-selection"

    @property
    def teacher(self) -> str | None:
        return self.settings.teacher

    @cached_property
    def scorer(self) -> Scorer:
        own = self.settings
        if own.scorer == "moba":
            return MobaScorer()
        if own.scorer == "index":
            return IndexScorer(own.index_dim)
        return SeaScorer(own.features, own.channels)

    @property
    def budget(self) -> Budget:
        own = self.settings
        return Budget(own.window, own.sinks, own.top_k, own.share)

    def check_settings(self) -> None:
        own = self.settings
        for name, known in (("scorer", SCORERS), ("queries", QUERIES)):
            if getattr(own, name) not in known:
                raise self.error(name, "unknown", f"Use {', '.join(known[:-1])} or {known[-1]}.")
        if own.top_k is None and own.share is None:
            raise self.error("top_k", "nothing says how many blocks to select", "Set top_k (blocks) or share.")
        if own.top_k is not None and own.share is not None:
            remedy = f"Set {self.setting}.top_k=null too, or leave share out."
            raise self.error("share", f"top_k={own.top_k} says how many blocks too", remedy)
        if own.top_k is not None and own.top_k < 1:
            raise self.error("top_k", "a query block selects at least one block", "Set 1 or more (blocks).")
        if own.share is not None and not 0 < own.share <= 1:
            raise self.error("share", "is no share of the earlier blocks", "Set above 0 and at most 1.")
        if own.window < 2:
            problem = "a query block always keeps its own block and the one before"
            raise self.error("window", problem, "Set 2 or more (blocks).")
        for name, least in (
            ("sinks", 0), ("warm_up_steps", 0), ("sampled_rows", 1), ("loss_weight", 0), ("mse_weight", 0),
            ("index_dim", 1), ("features", 1), ("channels", 1),
        ):  # fmt: skip
            if getattr(own, name) < least:
                raise self.error(name, "is too small", f"Set {least} or more.")
        defaults = BlockSelectionSettings()
        for name in sorted({name for names in _READ_BY.values() for name in names}.difference(_READ_BY[own.scorer])):
            if getattr(own, name) != (default := getattr(defaults, name)):
                readers = " and ".join(scorer for scorer, names in _READ_BY.items() if name in names)
                problem = f"scorer={own.scorer} does not read it, only {readers}"
                raise self.error(name, problem, f"Leave it out (default {default}), or set scorer.")

    def check(self, cfg: PretrainConfig) -> None:
        own, length, block = self.settings, cfg.train.seq_length, cfg.layout.block_size
        blocks = -(-length // block)
        sequence = f"a sequence of {length:,} tokens has {blocks} block{'s' * (blocks != 1)} of {block}"
        always = own.window + own.sinks
        room = blocks - always
        if room < 1:
            name = "window" if own.window >= own.sinks else "sinks"
            problem = f"{sequence}, and window and sinks always keep {always}: there is nothing to select"
            remedy = f"Set train.seq_length above {always * block}, smaller ones, or a smaller layout.block_size."
            raise self.error(name, problem, remedy)
        if own.top_k is not None and own.top_k > room:
            problem = f"{sequence}, of which {room} can be selected beside window and sinks"
            raise self.error("top_k", problem, f"Set it to {from_to(1, room)}.")
        chunks = 2 * cfg.parallel.cp
        if cfg.parallel.cp > 1 and own.sampled_rows % chunks:
            problem = f"parallel.cp={cfg.parallel.cp} splits a sequence into {chunks} chunks, which sample equally many"
            raise self.error("sampled_rows", problem, f"Set a multiple of {chunks}.")

        for name in ("pp", "cp"):
            if own.teacher is not None and (ranks := getattr(cfg.parallel, name)) > 1:
                problem = f"a teacher doesn't run with parallel.{name}={ranks}"
                raise self.error("teacher", problem, f"Set parallel.{name}=1, or leave the teacher out.")

    def weights(self, shape: AttentionShape) -> tuple[Weight, ...]:
        return self.scorer.weights(shape) + (mixing_weights(shape) if self.settings.mix_mean else ())

    def kept_positions(self, layer: LayerLayout, seq_length: int) -> tuple[float, ...]:
        size, total = layer.block_size, 0
        for row in range(layer.num_blocks(seq_length)):
            tokens = min(size, seq_length - row * size)
            total += (self.budget.num_kept(row) - 1) * size * tokens + tokens * (tokens + 1) // 2
        return (float(total),) * len(layer.bound)

    def extra_flops(self, layer: LayerLayout, seq_length: int, shape: AttentionShape) -> float:
        rows, complete = layer.num_blocks(seq_length), seq_length // layer.block_size
        selection = self.scorer.flops(rows, rows, complete * layer.block_size, shape)
        selection += self._mixing_flops(layer, seq_length, shape)
        if not self.scorer.losses:
            return selection
        teacher = 2 * shape.num_heads * shape.head_dim * self._num_sampled(seq_length) * seq_length
        return selection + self.scorer.flops(self._sampled_rows(seq_length), rows, 0, shape) + teacher

    def _mixing_flops(self, layer: LayerLayout, seq_length: int, shape: AttentionShape) -> int:
        return mixing_flops(seq_length, layer.block_size, shape) if self.settings.mix_mean else 0

    def _num_sampled(self, seq_length: int) -> int:
        return min(self.settings.sampled_rows, seq_length)

    def _sampled_rows(self, seq_length: int) -> int:
        """Rows that are scored with gradients after the warm-up."""
        return self._num_sampled(seq_length) * (self.scorer.earlier_rows + 1)

    def warm_up_steps(self) -> int:
        return self.settings.warm_up_steps

    def warm_up_flops(self, layer: LayerLayout, seq_length: int, shape: AttentionShape) -> float:
        rows, complete = layer.num_blocks(seq_length), seq_length // layer.block_size
        causal = seq_length * (seq_length + 1) // 2
        # A scorer learns from the mass, which computes Q Kᵀ again: in the forward pass alone, a third of a step.
        products = 4 + 2 / 3 * bool(self.scorer.losses)
        attention = products * shape.num_heads * shape.head_dim * causal + self._mixing_flops(layer, seq_length, shape)
        return attention + self.scorer.flops(rows, rows, complete * layer.block_size, shape)

    def reads_dense_layout(self, cfg: PretrainConfig) -> bool:
        return self.settings.warm_up_steps > 0

    def activation_bytes(self, layer: LayerLayout, seq_length: int, shape: AttentionShape, element_size: int) -> int:
        blocks = layer.num_blocks(seq_length)
        rows = blocks if self.settings.warm_up_steps else self._sampled_rows(seq_length)
        mixing = mixing_bytes(seq_length, shape, element_size) if self.settings.mix_mean else 0
        return mixing + self.scorer.activation_bytes(rows, blocks, seq_length, shape, element_size)

    def cpu_bytes(self, layer: LayerLayout, element_size: int) -> PairBytes:
        """A mask as of S2; and for scorers that learn, probabilities."""
        return PairBytes(10, 16) if self.scorer.losses else PairBytes(element_size, 2)

    def target_bytes(self, layer: LayerLayout, seq_length: int, shape: AttentionShape) -> int:
        blocks = layer.num_blocks(seq_length)
        rows = max(blocks * bool(self.settings.warm_up_steps), self._num_sampled(seq_length))
        return 4 * shape.num_query_groups * rows * blocks

    def columns(self) -> Mapping[str, float | None]:
        own = self.settings
        of_losses: dict[str, Any] = {"kl": own.loss_weight, "mse": own.mse_weight}
        return {name: of_losses[name] for name in self.scorer.losses} | {"recall": None}
