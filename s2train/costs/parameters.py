"""Exact parameter counts of the Llama-like model: no biases, SwiGLU, two RMSNorms a layer, one at the end."""

from dataclasses import dataclass

from s2train.config import ModelConfig, ParallelConfig


def head_dim(model: ModelConfig) -> int:
    """Of queries, keys and values; as set, or the hidden size shared out among the query heads."""
    return model.head_dim if model.head_dim is not None else model.hidden_size // model.num_attention_heads


@dataclass(frozen=True)
class LayerParameters:
    """Parameters of one layer: `matmul` are split over tensor parallel ranks, `norms` repeated on each."""

    matmul: int
    norms: int


def layer_parameters(model: ModelConfig) -> LayerParameters:
    """Numbers of parameters of one layer, not divided over ranks."""
    queries, keys = model.num_attention_heads * head_dim(model), model.num_query_groups * head_dim(model)
    attention = model.hidden_size * (queries + 2 * keys) + queries * model.hidden_size
    mlp = 3 * model.hidden_size * model.ffn_hidden_size  # gate, up, down
    return LayerParameters(matmul=attention + mlp, norms=2 * model.hidden_size)


def total_parameters(model: ModelConfig) -> int:
    """Parameters of the whole model; a tied embedding counts once."""
    layer = layer_parameters(model)
    embeddings = (1 if model.tie_embeddings else 2) * model.vocab_size * model.hidden_size
    return model.num_layers * (layer.matmul + layer.norms) + embeddings + model.hidden_size


def stage_parameters(model: ModelConfig, parallel: ParallelConfig, stage: int, layers: int) -> int:
    """Parameters that one rank of pipeline stage `stage`, of `layers` layers in all, holds.

    The first stage holds the embedding, the last the head and the final norm; a tied embedding lies on both
    when they differ.
    """
    layer = layer_parameters(model)
    first, last = stage == 0, stage == parallel.pp - 1
    tables = 1 if first and last and model.tie_embeddings else first + last
    of_layers = layers * (layer.matmul // parallel.tp + layer.norms)
    return of_layers + tables * model.vocab_size * model.hidden_size // parallel.tp + last * model.hidden_size
