"""Estimate one rank's memory by part, in bytes, from above.

Each term states its assumptions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from s2train.attention.hybrid import HybridLayout, dense_layer
from s2train.attention.kind import LayerLayout
from s2train.attention.teacher import teacher_setting
from s2train.config import PretrainConfig
from s2train.costs.activations import layer_activations, stage_activations
from s2train.costs.implementations import Implementations
from s2train.costs.parameters import attention_shape, layer_parameters, stage_parameters, total_parameters
from s2train.costs.rank_share import Chunks, data_parallel, element_bytes, micro_batches, rank_tokens
from s2train.costs.stages import Stages

GIB = 1024**3


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that needs the most memory.

    Attributes:
        weights: in the run's precision.
        gradients: fp32, all of them (Megatron's main gradients).
        optimizer: fp32 moments, and fp32 weights if the run's are bf16; the distributed optimizer divides them over
            data and context parallel ranks, and `optim.cpu_offload` keeps a share in the host's memory.
        activations: saved for the backward pass, plus the largest temporary of one layer or of the loss.
        layouts: block layouts of the sparse layers.
        overhead: CUDA context, library workspaces and communicators; Python and torch on a CPU.
        teacher: its weights in the run's precision, a forward pass, and what it gives the layers of a micro batch.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    layouts: int
    overhead: int
    teacher: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


def checkpoint_bytes(cfg: PretrainConfig, hybrid: HybridLayout) -> int:
    """Return bytes of a checkpoint on disk.

    It has weights in the run's precision, the optimizer's moments, and fp32 weights in addition to bf16 ones. The
    distributed optimizer saves fp32 weights in any precision.
    """
    has_copies = cfg.parallel.distributed_optimizer and cfg.train.precision != "bf16"
    optimizer = optimizer_bytes(cfg) + (4 if has_copies else 0)
    return total_parameters(cfg.model, hybrid.layers) * (element_bytes(cfg) + optimizer)


def optimizer_bytes(cfg: PretrainConfig) -> int:
    """Return bytes of optimizer state per parameter.

    Muon has one moment of a matrix, and Adam's two of embeddings and norms: counted as two everywhere.
    """
    moments = 1 if cfg.optim.name == "sgd" else 2
    return 4 * moments + (4 if cfg.train.precision == "bf16" else 0)


def offloaded_bytes(cfg: PretrainConfig, parameters: int, world_size: int) -> int:
    """Return bytes of host memory that a rank's offloaded optimizer takes.

    These are moments, and fp32 weights and gradients.

    Args:
        parameters: of the rank.
    """
    shards = data_parallel(cfg, world_size) * cfg.parallel.cp
    return round(cfg.optim.cpu_offload * 16 * parameters / shards)


def rank_memory(
    cfg: PretrainConfig,
    hybrid: HybridLayout,
    world_size: int,
    stages: Stages,
    layouts: int,
    device_type: str,
    impl: Implementations,
) -> Memory:
    """Estimate the memory of the pipeline rank that needs the most.

    Args:
        layouts: bytes.
        device_type: "cuda" or "cpu".
        impl: what computes the loss and SwiGLU.
    """
    ranks = (
        _stage_memory(cfg, world_size, stage, stages.layers_of_rank(hybrid, stage), layouts, device_type, impl)
        for stage in range(cfg.parallel.pp)
    )
    return max(ranks, key=lambda memory: memory.total)


def _stage_memory(
    cfg: PretrainConfig,
    world_size: int,
    stage: int,
    chunks: Chunks,
    layouts: int,
    device_type: str,
    impl: Implementations,
) -> Memory:
    weights = stage_parameters(cfg.model, cfg.parallel, stage, [layer for chunk in chunks for layer in chunk])
    shards = data_parallel(cfg, world_size) * cfg.parallel.cp if cfg.parallel.distributed_optimizer else 1
    return Memory(
        weights=weights * element_bytes(cfg),
        gradients=weights * 4,
        optimizer=round((1 - cfg.optim.cpu_offload) * -(-weights * optimizer_bytes(cfg) // shards)),
        activations=stage_activations(cfg, stage, chunks, micro_batches(cfg, world_size), device_type, impl),
        layouts=layouts,
        overhead=_overhead(cfg, world_size) if device_type == "cuda" else GIB // 2,
        teacher=teacher_bytes(cfg, [layer for chunk in chunks for layer in chunk], device_type),
    )


def teacher_bytes(cfg: PretrainConfig, layers: Sequence[LayerLayout], device_type: str) -> int:
    """Return bytes that the teacher of these layers takes.

    They are those of one rank, 0 without a teacher. Without gradients, one layer's activations exist at a time.
    """
    if teacher_setting(layers) is None:
        return 0
    model, train, parallel = cfg.model, cfg.train, cfg.parallel
    width = element_bytes(cfg)
    dense = layer_parameters(model, dense_layer(model.num_attention_heads, cfg.layout.block_size))
    weights = len(layers) * dense.on_rank(parallel.tp) + model.vocab_size * model.hidden_size // parallel.tp
    stream = train.seq_length * train.micro_batch_size * model.hidden_size * width
    stream //= parallel.tp if parallel.sequence_parallel else 1
    forward = layer_activations(cfg, stream, device_type)[0] + stream
    shape = attention_shape(model)
    targets = sum(layer.kind.target_bytes(layer, train.seq_length, shape) for layer in layers if layer.kind.teacher)
    peers = _peer_memory(cfg) if device_type == "cuda" else 0  # besides the student's
    return weights * width + forward + targets * train.micro_batch_size // parallel.tp + peers


def _overhead(cfg: PretrainConfig, world_size: int) -> int:
    """Return GPU bytes outside of torch's allocator.

    These are the CUDA context, libraries, and a communicator for each group in use. Measured on an H100: 0.6 GiB,
    0.15 GiB, and 8.1 GiB for all 21 communicators of a job of one rank; here 0.45 GiB each. NVIDIA/nccl#964 reports
    0.53 GiB for two ranks and 0.67 GiB for more.
    """
    parallel = cfg.parallel
    # World, tensor and data parallel, gradient norm; pipeline and its embeddings; context parallel.
    groups = 4 + 2 * (parallel.pp > 1) + (parallel.cp > 1)
    return int((0.75 + groups * (0.45 if world_size == 1 else 0.7)) * GIB) + _peer_memory(cfg)


def _peer_memory(cfg: PretrainConfig) -> int:
    """Return bytes that tensor parallel ranks address: two slots of rows."""
    return 2 * rank_tokens(cfg) * cfg.model.hidden_size * element_bytes(cfg) if cfg.parallel.tp_overlaps else 0
