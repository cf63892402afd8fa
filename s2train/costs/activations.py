"""Estimate the bytes of one rank's activations, from above.

They are what a forward pass saves for the backward, and the largest temporaries of both.
"""

from collections.abc import Iterable

from s2train.attention.kind import LayerLayout
from s2train.attention.weights import kv_heads_on_rank
from s2train.config import PretrainConfig, head_dim
from s2train.costs.cpu_attention import kept_on_cpu, temporary_on_cpu
from s2train.costs.implementations import Implementations
from s2train.costs.parameters import attention_shape
from s2train.costs.rank_share import Chunks, element_bytes, rank_tokens


def stage_activations(
    cfg: PretrainConfig,
    stage: int,
    chunks: Chunks,
    num_micro_batches: int,
    device_type: str,
    impl: Implementations,
) -> int:
    """Return peak activation bytes of a rank of pipeline stage `stage`.

    Its chunks have these layers.
    """
    model, train, parallel = cfg.model, cfg.train, cfg.parallel
    tokens, width = rank_tokens(cfg), element_bytes(cfg)
    # Sequence parallelism divides the tensors between the blocks: residual stream and norms.
    stream = tokens * model.hidden_size * width // (parallel.tp if parallel.sequence_parallel else 1)
    whole, kept = layer_activations(cfg, stream, device_type)

    # In the backward, one layer's MLP gradients coexist with its activations: gate and up (in place with Liger-Kernel),
    # their product, streams.
    gradients = 1 if impl.fuses_swiglu(cfg) else 3
    layer = gradients * tokens * model.ffn_hidden_size * width // parallel.tp + 2 * stream
    layer = max(layer, gathered_projection(cfg))
    # In that of its attention, what the MLP and the norm before it saved is freed already.
    layers = [layer for chunk in chunks for layer in chunk]
    attention = (
        attention_gradients(cfg, stream, device_type, layers, impl) - mlp_activations(cfg, device_type) - 2 * stream
    )
    on_cpu = max((temporary_on_cpu(cfg, layer) for layer in layers), default=0) if device_type == "cpu" else 0
    layer = max(layer, on_cpu)
    loss = 0
    if stage == parallel.pp - 1:
        loss = _loss_bytes(cfg, tokens, width, impl.loss(cfg)) + 3 * stream  # streams of the final norm, as above

    waiting = _chunks_in_flight(cfg, stage, num_micro_batches)
    in_flight = max(map(len, chunks)) * waiting
    own = [[kind_activations(cfg, layer, device_type) for layer in chunk] for chunk in chunks]
    largest = max((nbytes for chunk in own for nbytes in chunk), default=0)
    if train.recompute == "full":  # inputs of recomputed groups, and one group in full, when the loss is freed already
        group = train.recompute_num_layers
        return in_flight // group * stream + max(group * (whole + largest) + max(layer, attention), loss)
    if train.recompute == "selective":  # what the kind saves is recomputed with the core attention
        return in_flight * kept + max(layer + largest, attention + whole - kept + largest, loss)
    if train.recompute == "mlp":  # the MLP of one layer and the norm before it, when the loss is freed already
        kept += stream if impl.te else 0  # its norm before attention is part of a linear layer, and saves its output
        layer += mlp_activations(cfg, device_type) + (1 if device_type == "cuda" else 2) * stream
        attention += mlp_activations(cfg, device_type) + stream  # but of those, only the norm's input was saved
    return in_flight * kept + waiting * max(map(sum, own)) + max(layer, attention, loss)


def attention_gradients(
    cfg: PretrainConfig, stream: int, device_type: str, layers: Iterable[LayerLayout], impl: Implementations
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
    by_fa4 = [device_type == "cuda" and layer.is_dense and impl.dense(cfg) == "fa4" for layer in layers]
    more = [0]
    if any(by_fa4):  # dq, for one of a rank's two chunks at a time; dk and dv where several query heads add to them
        sums = 4 * queries // (2 if parallel.cp > 1 else 1) + (2 * 4 * keys if is_grouped else 0)
        more.append(max(sums, packed))
    if not all(by_fa4):
        sums = 0
        if device_type == "cuda" and train.precision == "bf16":
            # dq; dk and dv of second pairs (kernels.hopper.shared_tiles)
            sums = 4 * queries * (2 if cfg.layout.block_size == 64 and is_grouped else 1)
        more.append(sums + packed)
    return stream + 2 * queries * width + 2 * keys * width + max(more)


def kind_activations(cfg: PretrainConfig, layer: LayerLayout, device_type: str) -> int:
    """Return bytes that only this kind of attention saves for the backward.

    They are those of one layer and micro batch on a rank, in addition to what every kind saves.
    """
    width = element_bytes(cfg)
    whole = layer.kind.activation_bytes(layer, cfg.train.seq_length, attention_shape(cfg.model), width)
    own = whole * cfg.train.micro_batch_size // (cfg.parallel.tp * cfg.parallel.cp)
    return own + (kept_on_cpu(cfg, layer) if device_type == "cpu" else 0)


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


def layer_activations(cfg: PretrainConfig, stream: int, device_type: str) -> tuple[int, int]:
    """Return bytes that a layer saves per micro batch.

    The first number is without recomputation, the second with `train.recompute`. Assumes flash-like attention: nothing
    grows with the square of the length. `stream`: bytes of a tensor [s, b, hidden].
    """
    model, train, parallel = cfg.model, cfg.train, cfg.parallel
    tokens, width = rank_tokens(cfg), element_bytes(cfg)
    queries = tokens * model.num_attention_heads * head_dim(model) * width // parallel.tp
    keys = tokens * kv_heads_on_rank(model.num_query_groups, parallel.tp) * head_dim(model) * width

    fused = device_type == "cuda"  # RMSNorm is fused
    # Input and output of both norms; if not fused, also the values before the weight.
    residual = (4 if fused else 6) * stream
    # q and k after RoPE, the projection's output (v is a view of it; ranks that share KV heads copy v instead), and
    # attention's output.
    shares = parallel.tp > model.num_query_groups
    attention = (queries + keys) + (keys if shares else queries + 2 * keys) + queries
    if model.qk_norm:  # the norms' inputs, and fp32 scales of heads; if not fused, also the values before the weight
        attention += (1 if fused else 2) * (queries + keys) + 4 * (queries + keys) // (head_dim(model) * width)
    # Log-sum-exp in fp32; keys and values of all context parallel ranks (sparse layers may hold fewer).
    core = tokens * model.num_attention_heads * 4 // parallel.tp
    if parallel.cp > 1:
        core += 2 * keys * parallel.cp
    whole = residual + attention + core + mlp_activations(cfg, device_type)
    if train.recompute == "selective":
        return whole, whole - core
    if train.recompute == "mlp":  # inputs of both norms; if not fused, also the first one's values before the weight
        return whole, (2 if fused else 3) * stream + attention + core
    return whole, whole


def mlp_activations(cfg: PretrainConfig, device_type: str) -> int:
    """Return bytes that a layer's MLP saves, without its input.

    They are those of one micro batch.
    """
    ffn = rank_tokens(cfg) * cfg.model.ffn_hidden_size * element_bytes(cfg) // cfg.parallel.tp
    # Gate, up and their product. A CPU's SwiGLU is not fused: also SiLU of the gate and a copy of up.
    return (3 if device_type == "cuda" else 5) * ffn


def _chunks_in_flight(cfg: PretrainConfig, stage: int, num_micro_batches: int) -> int:
    """Return the most forward passes of model chunks that await their backward.

    The pipeline schedule is Megatron's 1F1B.
    """
    pp, vpp = cfg.parallel.pp, cfg.parallel.vpp
    if vpp is None:
        return min(num_micro_batches, pp - stage)
    return min(num_micro_batches * vpp, (pp - stage - 1) * 2 + (vpp - 1) * pp + 1)
