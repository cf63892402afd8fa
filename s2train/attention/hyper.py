"""HyperAttention: reads near keys exactly, and a selection of the others.

Of the others, a query reads a bucket of similar keys and a sample. Keys are hashed, so that a query finds those that
point in a similar direction. What is exact, what is sampled: docs/hyperattention.md.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from s2train.attention.features import Feature
from s2train.attention.hyper_reads import expected_reads
from s2train.attention.kind import DataDependentKind, LayerLayout, PairBytes
from s2train.attention.weights import AttentionShape, Weight
from s2train.config import PretrainConfig, head_dim
from s2train.errors import ConfigError
from s2train.kernels import hyper
from s2train.kernels.hyper.settings import levels

_BLOCK = 16  # tokens, of which exact keys are multiples
_MOST_PROJECTIONS = 30
_LARGEST_HEAD = 256  # dimensions, of the kernels


@dataclass(frozen=True)
class HyperSettings:
    """Settings of the kind.

    All but the last are settings of the op, in tokens or keys.

    Attributes:
        bucket: keys of one hash that a query reads in each interval.
        samples: keys drawn from each interval.
        projections: bits of the hash.
        shortest: keys of the shortest interval; a query reads its own one exactly.
        window: keys before the query that are always exact, at least.
        sinks: first keys of the sequence, always exact.
        fixed_projections: hash by the same directions in every step; samples are redrawn in any case.
    """

    bucket: int = 256
    samples: int = 256
    projections: int = 16
    shortest: int = 1024
    window: int = 256
    sinks: int = 128
    fixed_projections: bool = False


class HyperKind(DataDependentKind):
    """Near-linear attention: strictly causal, with the gradients of what it computes."""

    name = "hyper"
    settings_type = HyperSettings
    core_attention = "s2train.megatron.hyper_attention:HyperCoreAttention"
    counts_exactly = False
    decodes_as_trained = False  # exact attention over the cached keys
    features = frozenset(
        {
            Feature.TENSOR_PARALLEL,
            Feature.SHARED_KV_HEADS,
            Feature.SEQUENCE_PARALLEL,
            Feature.PIPELINE_PARALLEL,
            Feature.PACKED_DOCUMENTS,
            Feature.RECOMPUTATION,
            Feature.DETERMINISTIC,
            Feature.DECODING,
        }
    )
    may_change = frozenset(asdict(HyperSettings()))  # it has no weights

    settings: HyperSettings

    @property
    def op_settings(self) -> hyper.HyperSettings:
        """What the op takes."""
        own = asdict(self.settings)
        del own["fixed_projections"]
        return hyper.HyperSettings(**own)

    def check_settings(self) -> None:
        own = self.settings
        for name in ("bucket", "shortest"):
            value = getattr(own, name)
            if value < _BLOCK or value & (value - 1):
                raise self.error(name, f"is no power of two from {_BLOCK} on", "Set 256, or another power of two.")
        if own.bucket > own.shortest:
            problem = f"is larger than the shortest interval, of {own.shortest} keys"
            raise self.error("bucket", problem, f"Set {own.shortest} or less, or a longer shortest interval.")
        if own.samples < 1:
            raise self.error("samples", "without samples the result is biased", "Set 1 or more.")
        if not 1 <= own.projections <= _MOST_PROJECTIONS:
            raise self.error("projections", "the hash has too many or too few bits", f"Set 1 to {_MOST_PROJECTIONS}.")
        for name in ("window", "sinks"):
            value = getattr(own, name)
            if value % _BLOCK or not 0 <= value <= own.shortest:
                remedy = f"Set a multiple of {_BLOCK} from 0 to {own.shortest} ({self.setting}.shortest)."
                raise self.error(name, f"exact keys are blocks of {_BLOCK}, up to the shortest interval", remedy)

    def check(self, cfg: PretrainConfig) -> None:
        own, length = self.settings, cfg.train.seq_length
        model = cfg.model
        if (dim := head_dim(model)) > _LARGEST_HEAD:
            problem = f"{self.label} attention (letter {self.letter}) hashes heads of up to {_LARGEST_HEAD} dimensions"
            raise ConfigError("model.head_dim", dim, problem, "Set more model.num_attention_heads, or another kind.")
        intervals = levels(self.op_settings, length, causal=True)
        if not intervals:
            problem = f"a sequence of train.seq_length={length:,} tokens is one interval, which is read exactly"
            raise self.error("shortest", problem, "Set a shorter interval, or dense attention (letter D).")
        if own.samples > (longest := intervals[-1].size):
            problem = f"the longest interval of train.seq_length={length:,} tokens has {longest:,} keys"
            raise self.error("samples", problem, f"Set {longest} or fewer.")

    def weights(self, shape: AttentionShape) -> tuple[Weight, ...]:
        return ()

    def kept_positions(self, layer: LayerLayout, seq_length: int) -> tuple[float, ...]:
        return (expected_reads(self.op_settings, seq_length),) * len(layer.bound)

    def extra_flops(self, layer: LayerLayout, seq_length: int, shape: AttentionShape) -> float:
        """Products of the hash; its backward, which is counted too, doesn't exist."""
        return 2 * shape.head_dim * self.settings.projections * _vectors(shape) * seq_length

    def reads_dense_layout(self, cfg: PretrainConfig) -> bool:
        return cfg.data.attention_within_documents  # for short documents

    def activation_bytes(self, layer: LayerLayout, seq_length: int, shape: AttentionShape, element_size: int) -> int:
        """Count the bytes of hashes, orders of keys, and buckets.

        All are int32: the hash of every query and key and, on each level, the order of keys and the buckets of queries.
        """
        reading = sum(level.reading(seq_length) for level in levels(self.op_settings, seq_length, causal=True))
        return 4 * _vectors(shape) * (seq_length + reading)

    def cpu_bytes(self, layer: LayerLayout, element_size: int) -> PairBytes:
        """Masks and probabilities of all keys; of bf16 also in fp32."""
        return PairBytes(2 if element_size == 4 else 5, 21)

    def columns(self) -> Mapping[str, float | None]:
        return {}


def _vectors(shape: AttentionShape) -> int:
    """Queries and keys of a position."""
    return shape.num_heads + shape.num_query_groups
