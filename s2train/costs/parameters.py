"""Exact parameter counts of the Llama-like model.

The model has SwiGLU, two RMSNorms per layer and one at the end, and no biases. A layer also has the weights of its kind
of attention, and with `model.qk_norm` norms of queries and keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from s2train.attention.kind import LayerLayout
from s2train.attention.weights import AttentionShape
from s2train.config import ModelConfig, ParallelConfig, head_dim


def attention_shape(model: ModelConfig) -> AttentionShape:
    """Return the sizes of each layer's attention."""
    return AttentionShape(model.hidden_size, model.num_attention_heads, model.num_query_groups, head_dim(model))


@dataclass(frozen=True)
class LayerParameters:
    """Parameters of one layer, not divided over ranks.

    Attributes:
        matmul: of projections and MLP, divided over tensor parallel ranks.
        norms: repeated on each.
        kind_split, kind_repeated: weights that the kind of attention adds, divided or repeated.
    """

    matmul: int
    norms: int
    kind_split: int = 0
    kind_repeated: int = 0

    def on_rank(self, tp: int) -> int:
        """Return what one of `tp` tensor parallel ranks holds."""
        return self.matmul // tp + self.norms + self.kind_split // tp + self.kind_repeated


def layer_parameters(model: ModelConfig, layer: LayerLayout) -> LayerParameters:
    """Count the parameters of one layer."""
    queries, keys = model.num_attention_heads * head_dim(model), model.num_query_groups * head_dim(model)
    attention = model.hidden_size * (queries + 2 * keys) + queries * model.hidden_size
    own = layer.kind.weights(attention_shape(model))
    return LayerParameters(
        matmul=attention + mlp_parameters(model),
        norms=2 * model.hidden_size + (2 * head_dim(model) if model.qk_norm else 0),
        kind_split=sum(weight.size for weight in own if weight.split is not None),
        kind_repeated=sum(weight.size for weight in own if weight.split is None),
    )


def mlp_parameters(model: ModelConfig) -> int:
    """Count the parameters of one layer's MLP: gate, up and down."""
    return 3 * model.hidden_size * model.ffn_hidden_size


def total_parameters(model: ModelConfig, layers: Sequence[LayerLayout]) -> int:
    """Count the parameters of the whole model; a tied embedding counts once."""
    embeddings = (1 if model.tie_embeddings else 2) * model.vocab_size * model.hidden_size
    return sum(layer_parameters(model, layer).on_rank(1) for layer in layers) + embeddings + model.hidden_size


def stage_parameters(model: ModelConfig, parallel: ParallelConfig, stage: int, layers: Sequence[LayerLayout]) -> int:
    """Count the parameters on one rank of pipeline stage `stage`.

    `layers` are all layers of the stage. The first stage holds the embedding, the last the head and the final norm; a
    tied embedding lies on both if they differ.
    """
    first, last = stage == 0, stage == parallel.pp - 1
    tables = 1 if first and last and model.tie_embeddings else first + last
    of_layers = sum(layer_parameters(model, layer).on_rank(parallel.tp) for layer in layers)
    return of_layers + tables * model.vocab_size * model.hidden_size // parallel.tp + last * model.hidden_size
