"""Exports of small random models, with any layout, without training."""

import json
from pathlib import Path
from typing import Any

import torch

from s2train.attention.hybrid import HybridLayout
from s2train.checkpoints.hugging_face.folder import write_weights
from s2train.checkpoints.hugging_face.layout_json import layout_json
from s2train.checkpoints.hugging_face.weights import llama_shapes
from s2train.config import ModelConfig

VOCABULARY, HEAD_DIM, HIDDEN = 96, 32, 64  # vLLM's attention on a CPU takes heads of 32 or more


def write_export(
    folder: Path,
    layout: HybridLayout,
    *,
    length: int = 512,
    dtype: str = "float32",
    vocab_size: int = VOCABULARY,
    qk_norm: bool = False,
    **changed: Any,
) -> Path:
    """Write config.json and weights, whose greedy tokens don't depend on rounding."""
    num_heads = len(layout.layers[0].bound)
    model = ModelConfig(
        "x", len(layout.layers), HIDDEN, 96, num_heads, layout.num_query_groups, HEAD_DIM, vocab_size,
        tie_embeddings=False, qk_norm=qk_norm,
    )  # fmt: skip
    folder.mkdir(parents=True)
    weights = {
        name: torch.randn(shape) * 0.3 if len(shape) > 1 else torch.rand(shape) + 0.5
        for name, shape in llama_shapes(model).items()
    }
    write_weights(folder, {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()})
    config = {
        "architectures": ["S2ForCausalLM"],
        "model_type": "s2_llama",
        "auto_map": {"AutoConfig": "modeling_s2.S2Config", "AutoModelForCausalLM": "modeling_s2.S2ForCausalLM"},
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": len(layout.layers),
        "num_attention_heads": num_heads,
        "num_key_value_heads": layout.num_query_groups,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000.0,
        "partial_rotary_factor": 1.0,
        "qk_norm": qk_norm,
        "max_position_embeddings": length,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "eos_token_id": None,
        "layout": layout_json(layout),
    }
    (folder / "config.json").write_text(json.dumps(config | changed))
    return folder
