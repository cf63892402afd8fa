"""Initial weights that don't depend on the parallel division.

Megatron draws each rank's part separately, with a different seed on each tensor parallel rank of a GPU and on each
pipeline stage. Here every rank repeats the draws of the undivided model and keeps its part.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from s2train.config import ModelConfig, head_dim


@dataclass(frozen=True)
class _Draw:
    """One matrix of the whole model.

    Attributes:
        names: the parameters that hold it; layers count from 0 over the whole model. Tied embeddings have two names.
        shape: [out, in], undivided.
        draw: fills a tensor in place.
        dim: the dimension that tensor parallel ranks divide.
        parts: parts of that dimension, each divided over the ranks (2: gate and up).
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    draw: Callable[[Tensor], object]
    dim: int
    parts: int = 1


def draw_initial_weights(
    model: ModelConfig, config: TransformerConfig, seed: int, chunks: Sequence[GPTModel], device: torch.device
) -> None:
    """Set this rank's matrices to the values that one rank would draw.

    Does nothing without tensor and pipeline parallelism, where Megatron has just drawn these values. The random
    generators' state is preserved. Only one whole matrix is in memory at a time.
    """
    tp, rank = config.tensor_model_parallel_size, parallel_state.get_tensor_model_parallel_rank()
    if tp == 1 and config.pipeline_model_parallel_size == 1:
        return
    here = dict(_matrices(chunks))
    # As in Megatron: drawn in fp32 on a CPU, else in the parameters' precision.
    dtype = torch.float32 if config.use_cpu_initialization else config.params_dtype
    with torch.no_grad(), _generator_of_one_rank(seed, config):
        for matrix in _whole_model(model, config):
            whole = torch.empty(matrix.shape, dtype=dtype, device=device)
            matrix.draw(whole)
            for name in matrix.names:
                if (parameter := here.pop(name, None)) is not None:
                    parts = whole.chunk(matrix.parts, matrix.dim)
                    parameter.copy_(torch.cat([part.chunk(tp, matrix.dim)[rank] for part in parts], matrix.dim))
    if here:
        raise RuntimeError(f"no initial values for {', '.join(here)}")


def _whole_model(model: ModelConfig, config: TransformerConfig) -> Iterator[_Draw]:
    """Yield all matrices in Megatron's order of drawing on one rank."""
    hidden, ffn, dim = model.hidden_size, model.ffn_hidden_size, head_dim(model)
    queries, groups = model.num_attention_heads * dim, model.num_query_groups * dim
    inner, outer, table = config.init_method, config.output_layer_init_method, config.embedding_init_method
    assert inner is not None
    assert outer is not None
    assert table is not None
    embedding, head = "embedding.word_embeddings.weight", "output_layer.weight"
    yield _Draw((embedding, head) if model.tie_embeddings else (embedding,), (model.vocab_size, hidden), table, 0)
    for layer in range(model.num_layers):
        attention, mlp = f"decoder.layers.{layer}.self_attention", f"decoder.layers.{layer}.mlp"
        yield _Draw((f"{attention}.linear_proj.weight",), (hidden, queries), outer, 1)
        yield _Draw((f"{attention}.linear_qkv.weight",), (queries + 2 * groups, hidden), inner, 0)
        yield _Draw((f"{mlp}.linear_fc1.weight",), (2 * ffn, hidden), inner, 0, parts=2)
        yield _Draw((f"{mlp}.linear_fc2.weight",), (hidden, ffn), outer, 1)
    if not model.tie_embeddings:
        yield _Draw((head,), (model.vocab_size, hidden), inner, 0)


def _matrices(chunks: Sequence[GPTModel]) -> Iterator[tuple[str, Tensor]]:
    """This rank's matrices, by their names in the whole model."""
    for chunk in chunks:
        layers = {f"decoder.layers.{i}.": layer.layer_number - 1 for i, layer in enumerate(chunk.decoder.layers)}
        for name, parameter in chunk.named_parameters():
            # Norms start as ones; what a kind of attention adds has its values, see `kind_weights`.
            if parameter.dim() < 2 or ".core_attention." in name:
                continue
            prefix = next((prefix for prefix in layers if name.startswith(prefix)), None)
            yield (
                name if prefix is None else f"decoder.layers.{layers[prefix]}.{name.removeprefix(prefix)}",
                parameter,
            )


@contextmanager
def _generator_of_one_rank(seed: int, config: TransformerConfig) -> Iterator[None]:
    """Return Megatron's random generator of initial weights.

    Its state is that of a job of one rank at the start.
    """
    tracker = tensor_parallel.get_cuda_rng_tracker()
    states, cpu, cuda = tracker.get_states(), torch.get_rng_state(), torch.cuda.get_rng_state()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, tp_rank=0)
    try:
        if config.use_cpu_initialization:
            yield
        else:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                yield
    finally:
        tensor_parallel.get_cuda_rng_tracker().set_states(states)
        torch.cuda.set_rng_state(cuda)
        torch.set_rng_state(cpu)
