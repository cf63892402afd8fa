"""Convert weights between a Llama and Megatron's GPTModel."""

from collections.abc import Mapping

import torch
from torch import Tensor

from s2train.config import ModelConfig, head_dim

# Weights of a layer, Megatron's on the left; prefixes are `decoder.layers.N.` and `model.layers.N.`
_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_QK_NORM = {f"self_attention.{name}_layernorm.weight": f"self_attn.{name}_norm.weight" for name in "qk"}
_QKV, _FC1 = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"
_QKV_PARTS = [f"self_attn.{name}_proj.weight" for name in "qkv"]
_FC1_PARTS = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_ENDS = {
    "embedding.word_embeddings.weight": EMBEDDING,
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": OUTPUT,
}


def llama_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of such a Llama, by name.

    With tied embeddings there is no lm_head. With `qk_norm` there are Qwen3's norms of queries and keys too.
    """
    hidden, ffn, dim = model.hidden_size, model.ffn_hidden_size, head_dim(model)
    queries, keys = model.num_attention_heads * dim, model.num_query_groups * dim
    of_layer = {
        "input_layernorm.weight": (hidden,),
        **dict(zip(_QKV_PARTS, [(queries, hidden), (keys, hidden), (keys, hidden)], strict=True)),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        **dict.fromkeys(_FC1_PARTS, (ffn, hidden)),
        "mlp.down_proj.weight": (hidden, ffn),
        **(dict.fromkeys(_QK_NORM.values(), (dim,)) if model.qk_norm else {}),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (model.vocab_size, hidden)}
    for layer in range(model.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    return shapes if model.tie_embeddings else shapes | {OUTPUT: (model.vocab_size, hidden)}


def unknown_weights(weights: Mapping[str, Tensor], model: ModelConfig) -> list[str]:
    """List a GPTModel's weights that a Llama has no place for.

    Extra state doesn't count.
    """
    of_layer = (*_unchanged(model), _QKV, _FC1)
    known = {*_ENDS, *(f"decoder.layers.{n}.{name}" for n in range(model.num_layers) for name in of_layer)}
    return [name for name in weights if name not in known and not name.endswith("_extra_state")]


def _unchanged(model: ModelConfig) -> dict[str, str]:
    """Map names of a layer's weights that are only renamed."""
    return _LAYER | _QK_NORM if model.qk_norm else _LAYER


def to_llama(weights: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Convert a whole GPTModel's weights to a Llama's.

    Megatron stores the rows of a KV group (queries, key, value) together: [groups, (q + 2) · d, hidden].

    Raises:
        ValueError: a Llama has no place for a weight.
    """
    if unknown := unknown_weights(weights, model):
        raise ValueError(f"a Llama has no place for {', '.join(unknown)}")
    found = {new: weights[old] for old, new in _ENDS.items() if old in weights}
    group = model.num_attention_heads // model.num_query_groups
    for layer in range(model.num_layers):
        old, new = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        found |= {new + theirs: weights[old + ours] for ours, theirs in _unchanged(model).items()}
        rows = weights[old + _QKV].view(model.num_query_groups, group + 2, head_dim(model), model.hidden_size)
        for name, part in zip(_QKV_PARTS, rows.split([group, 1, 1], dim=1), strict=True):
            found[new + name] = part.reshape(-1, model.hidden_size)
        for name, part in zip(_FC1_PARTS, weights[old + _FC1].chunk(2), strict=True):
            found[new + name] = part
    return {name: found[name] for name in llama_shapes(model)}


def from_llama(weights: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Convert a Llama's weights to a GPTModel's; the inverse of `to_llama`."""
    found = {old: weights[new] for old, new in _ENDS.items() if new in weights}
    for layer in range(model.num_layers):
        old, new = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        found |= {new + ours: weights[old + theirs] for ours, theirs in _unchanged(model).items()}
        parts = [weights[old + name].unflatten(0, (model.num_query_groups, -1)) for name in _QKV_PARTS]
        found[new + _QKV] = torch.cat(parts, dim=1).flatten(0, 1)
        found[new + _FC1] = torch.cat([weights[old + name] for name in _FC1_PARTS])
    return found


def with_rows(weight: Tensor, rows: int) -> Tensor:
    """Resize an embedding [vocab, hidden]: cut rows or append zeros."""
    if rows <= len(weight):
        return weight[:rows]
    return torch.cat([weight, weight.new_zeros(rows - len(weight), weight.shape[1])])
