"""Estimate one rank's memory by part, in bytes, from above.

Each term states its assumptions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from s2train.attention.hybrid import HybridLayout, dense_layer
from s2train.attention.kind import LayerLayout
from s2train.attention.teacher import teacher_setting
from s2train.attention.weights import kv_heads_on_rank
from s2train.config import PretrainConfig, head_dim
from s2train.costs.implementations import Implementations
from s2train.costs.parameters import attention_shape, layer_parameters, stage_parameters, total_parameters
from s2train.costs.stages import Stages

GIB = 1024**3
Chunks = tuple[tuple[LayerLayout, ...], ...]  # the layers of each model chunk of a rank


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


def element_bytes(cfg: PretrainConfig) -> int:
    """Return bytes of a weight or an activation in the run's precision."""
    return 2 if cfg.train.precision == "bf16" else 4


def rank_tokens(cfg: PretrainConfig) -> int:
    """Return the tokens of a micro batch on a rank."""
    return cfg.train.seq_length // cfg.parallel.cp * cfg.train.micro_batch_size


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


def data_parallel(cfg: PretrainConfig, world_size: int) -> int:
    """Return the number of model copies that `world_size` ranks hold."""
    return world_size // (cfg.parallel.tp * cfg.parallel.pp * cfg.parallel.cp)


def micro_batches(cfg: PretrainConfig, world_size: int) -> int:
    """Return micro batches per step on each data-parallel rank."""
    return cfg.train.global_batch_size // (data_parallel(cfg, world_size) * cfg.train.micro_batch_size)


def rank_memory(
    cfg: PretrainConfig,
    hybrid: HybridLayout,
    world_size: int,
    stages: Stages,
    layouts: int,
    kind: str,
    impl: Implementations,
) -> Memory:
    """Estimate the memory of the pipeline rank that needs the most.

    Args:
        layouts: bytes.
        kind: "cuda" or "cpu".
        impl: what computes the loss and SwiGLU.
    """
    ranks = (
        _stage_memory(cfg, world_size, stage, stages.layers_of_rank(hybrid, stage), layouts, kind, impl)
        for stage in range(cfg.parallel.pp)
    )
    return max(ranks, key=lambda memory: memory.total)


def _stage_memory(
    cfg: PretrainConfig,
    world_size: int,
    stage: int,
    chunks: Chunks,
    layouts: int,
    kind: str,
    impl: Implementations,
) -> Memory:
    weights = stage_parameters(cfg.model, cfg.parallel, stage, [layer for chunk in chunks for layer in chunk])
    shards = data_parallel(cfg, world_size) * cfg.parallel.cp if cfg.parallel.distributed_optimizer else 1
    return Memory(
        weights=weights * element_bytes(cfg),
        gradients=weights * 4,
        optimizer=round((1 - cfg.optim.cpu_offload) * -(-weights * optimizer_bytes(cfg) // shards)),
        activations=stage_activations(cfg, stage, chunks, micro_batches(cfg, world_size), kind, impl),
        layouts=layouts,
        overhead=_overhead(cfg, world_size) if kind == "cuda" else GIB // 2,
        teacher=teacher_bytes(cfg, [layer for chunk in chunks for layer in chunk], kind),
    )


def teacher_bytes(cfg: PretrainConfig, layers: Sequence[LayerLayout], kind: str) -> int:
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
    forward = layer_activations(cfg, stream, kind)[0] + stream
    shape = attention_shape(model)
    targets = sum(layer.kind.target_bytes(layer, train.seq_length, shape) for layer in layers if layer.kind.teacher)
    peers = _peer_memory(cfg) if kind == "cuda" else 0  # besides the student's
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


def stage_activations(
    cfg: PretrainConfig,
    stage: int,
    chunks: Chunks,
    num_micro_batches: int,
    kind: str,
    impl: Implementations,
) -> int:
    """Return peak activation bytes of a rank of pipeline stage `stage`.

    Its chunks have these layers.
    """
    model, train, parallel = cfg.model, cfg.train, cfg.parallel
    tokens, width = rank_tokens(cfg), element_bytes(cfg)
    # Sequence parallelism divides the tensors between the blocks: residual stream and norms.
    stream = tokens * model.hidden_size * width // (parallel.tp if parallel.sequence_parallel else 1)
    whole, kept = layer_activations(cfg, stream, kind)

    # In the backward, one layer's MLP gradients coexist with its activations: gate and up (in place with Liger-Kernel),
    # their product, streams.
    gradients = 1 if impl.fuses_swiglu(cfg) else 3
    layer = gradients * tokens * model.ffn_hidden_size * width // parallel.tp + 2 * stream
    layer = max(layer, gathered_projection(cfg))
    # In that of its attention, what the MLP and the norm before it saved is freed already.
    layers = [layer for chunk in chunks for layer in chunk]
    attention = attention_gradients(cfg, stream, kind, layers, impl) - mlp_activations(cfg, kind) - 2 * stream
    loss = 0
    if stage == parallel.pp - 1:
        loss = _loss_bytes(cfg, tokens, width, impl.loss(cfg)) + 3 * stream  # streams of the final norm, as above

    waiting = _chunks_in_flight(cfg, stage, num_micro_batches)
    in_flight = max(map(len, chunks)) * waiting
    own = [[kind_activations(cfg, layer) for layer in chunk] for chunk in chunks]
    largest = max((nbytes for chunk in own for nbytes in chunk), default=0)
    if train.recompute == "full":  # inputs of recomputed groups, and one group in full, when the loss is freed already
        group = train.recompute_num_layers
        return in_flight // group * stream + max(group * (whole + largest) + max(layer, attention), loss)
    if train.recompute == "selective":  # what the kind saves is recomputed with the core attention
        return in_flight * kept + max(layer + largest, attention + whole - kept + largest, loss)
    if train.recompute == "mlp":  # the MLP of one layer and the norm before it, when the loss is freed already
        kept += stream if impl.te else 0  # its norm before attention is part of a linear layer, and saves its output
        layer += mlp_activations(cfg, kind) + (1 if kind == "cuda" else 2) * stream
        attention += mlp_activations(cfg, kind) + stream  # but of those, only the norm's input was saved
    return in_flight * kept + waiting * max(map(sum, own)) + max(layer, attention, loss)


def attention_gradients(
    cfg: PretrainConfig, stream: int, kind: str, layers: Iterable[LayerLayout], impl: Implementations
) -> int:
    """Return bytes of temporaries in the backward pass of one layer's attention.

    They are those of the layer that needs the most: the gradients of the residual stream, the output, and q, k and v,
    and what its kernels sum in fp32. Under context parallel k and v are those of all ranks, whose gradients exist a
    second time, packed for their ranks. FlashAttention-4's sums are freed before.

    Args:
        stream: bytes of a tensor [s, b, hidden].
        layers: of the stage.
    """
    model, train, parallel = cfg.model, cfg.train, cfg.parallel
    tokens, width = rank_tokens(cfg), element_bytes(cfg)
    heads, kv_heads = model.num_attention_heads // parallel.tp, kv_heads_on_rank(model.num_query_groups, parallel.tp)
    queries, keys = (tokens * count * head_dim(model) for count in (heads, kv_heads))
    keys *= parallel.cp
    packed = 2 * keys * width if parallel.cp > 1 else 0
    is_grouped = kv_heads < heads
    by_fa4 = [kind == "cuda" and layer.is_dense and impl.dense(cfg) == "fa4" for layer in layers]
    more = [0]
    if any(by_fa4):  # dq, for one of a rank's two chunks at a time; dk and dv where several query heads add to them
        sums = 4 * queries // (2 if parallel.cp > 1 else 1) + (2 * 4 * keys if is_grouped else 0)
        more.append(max(sums, packed))
    if not all(by_fa4):
        sums = 0
        if kind == "cuda" and train.precision == "bf16":  # dq; dk and dv of second pairs (kernels.hopper.shared_tiles)
            sums = 4 * queries * (2 if cfg.layout.block_size == 64 and is_grouped else 1)
        more.append(sums + packed)
    return stream + 2 * queries * width + 2 * keys * width + max(more)


def kind_activations(cfg: PretrainConfig, layer: LayerLayout) -> int:
    """Return bytes that only this kind of attention saves for the backward.

    They are those of one layer and micro batch on a rank, in addition to what every kind saves.
    """
    width = element_bytes(cfg)
    whole = layer.kind.activation_bytes(layer, cfg.train.seq_length, attention_shape(cfg.model), width)
    return whole * cfg.train.micro_batch_size // (cfg.parallel.tp * cfg.parallel.cp)


def gathered_projection(cfg: PretrainConfig) -> int:
    """Return bytes of the QKV projection's output that ranks gather.

    The result is 0 unless ranks share KV heads. It counts the heads of all ranks and this rank's own part, for the
    tokens of a micro batch. The gradient has the same size in the backward pass.
    """
    model, parallel = cfg.model, cfg.parallel
    if parallel.tp <= model.num_query_groups:
        return 0
    heads = model.num_attention_heads + 2 * model.num_query_groups
    whole = heads * head_dim(model) * rank_tokens(cfg) * element_bytes(cfg)
    return whole + whole // parallel.tp


def _loss_bytes(cfg: PretrainConfig, tokens: int, width: int, way: str) -> int:
    """Return peak bytes of the logits and the loss's temporaries."""
    model, parallel = cfg.model, cfg.parallel
    if way == "linear":  # a piece of the logits, the weight's gradient in fp32 and in `width`
        pieces = -(-model.vocab_size // model.hidden_size)
        piece = min(1 << (-(-tokens // pieces) - 1).bit_length(), tokens)
        return piece * model.vocab_size * width + model.vocab_size * model.hidden_size * (4 + width)
    logits = tokens * model.vocab_size // parallel.tp
    # Logits and their gradient in `width`, softmax in fp32. Liger-Kernel has no copy of the logits beside the other
    # two, and in place only one tensor; Megatron has a second softmax.
    if way == "in_place":
        return logits * width
    return logits * (width + 4 if way == "liger" else 2 * width + 8)


def layer_activations(cfg: PretrainConfig, stream: int, kind: str) -> tuple[int, int]:
    """Return bytes that a layer saves per micro batch.

    The first number is without recomputation, the second with `train.recompute`. Assumes flash-like attention: nothing
    grows with the square of the length. `stream`: bytes of a tensor [s, b, hidden].
    """
    model, train, parallel = cfg.model, cfg.train, cfg.parallel
    tokens, width = rank_tokens(cfg), element_bytes(cfg)
    queries = tokens * model.num_attention_heads * head_dim(model) * width // parallel.tp
    keys = tokens * kv_heads_on_rank(model.num_query_groups, parallel.tp) * head_dim(model) * width

    fused = kind == "cuda"  # RMSNorm is fused
    # Input and output of both norms; if not fused, also the values before the weight.
    residual = (4 if fused else 6) * stream
    # q and k after RoPE, the projection's output (v is a view of it; ranks that share KV heads copy v instead), and
    # attention's output.
    shares = parallel.tp > model.num_query_groups
    attention = (queries + keys) + (keys if shares else queries + 2 * keys) + queries
    # Log-sum-exp in fp32; keys and values of all context parallel ranks (sparse layers may hold fewer).
    core = tokens * model.num_attention_heads * 4 // parallel.tp
    if parallel.cp > 1:
        core += 2 * keys * parallel.cp
    whole = residual + attention + core + mlp_activations(cfg, kind)
    if train.recompute == "selective":
        return whole, whole - core
    if train.recompute == "mlp":  # inputs of both norms; if not fused, also the first one's values before the weight
        return whole, (2 if fused else 3) * stream + attention + core
    return whole, whole


def mlp_activations(cfg: PretrainConfig, kind: str) -> int:
    """Return bytes that a layer's MLP saves, without its input.

    They are those of one micro batch.
    """
    ffn = rank_tokens(cfg) * cfg.model.ffn_hidden_size * element_bytes(cfg) // cfg.parallel.tp
    # Gate, up and their product. A CPU's SwiGLU is not fused: also SiLU of the gate and a copy of up.
    return (3 if kind == "cuda" else 5) * ffn


def _chunks_in_flight(cfg: PretrainConfig, stage: int, num_micro_batches: int) -> int:
    """Return the most forward passes of model chunks that await their backward.

    The pipeline schedule is Megatron's 1F1B.
    """
    pp, vpp = cfg.parallel.pp, cfg.parallel.vpp
    if vpp is None:
        return min(num_micro_batches, pp - stage)
    return min(num_micro_batches * vpp, (pp - stage - 1) * 2 + (vpp - 1) * pp + 1)
