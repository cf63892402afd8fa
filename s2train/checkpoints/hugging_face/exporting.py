"""Export a checkpoint as a folder for Hugging Face's libraries."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from s2train.attention.dense import DenseKind
from s2train.attention.features import Feature
from s2train.checkpoints.folders import find_checkpoint, read_config
from s2train.checkpoints.hugging_face.config import ExportConfig
from s2train.checkpoints.hugging_face.folder import require_safetensors, write_weights
from s2train.checkpoints.hugging_face.layout_json import layout_json
from s2train.checkpoints.hugging_face.rope_scaling import longest_length, to_hugging_face
from s2train.checkpoints.hugging_face.run_settings import KEY, settings_json
from s2train.checkpoints.hugging_face.tokenizer_files import write_tokenizer
from s2train.checkpoints.hugging_face.weights import (
    EMBEDDING,
    OUTPUT,
    head_dim,
    to_llama,
    unknown_weights,
    with_rows,
)
from s2train.checkpoints.inference_model import load_for_inference
from s2train.checkpoints.trained import check_tokenizer
from s2train.config import ParallelConfig, PretrainConfig
from s2train.data.tokenizers import FileTokenizer, Tokenizer, load_tokenizer
from s2train.errors import ConfigError
from s2train.files import check_writable
from s2train.megatron.model import unwrap
from s2train.megatron.setup import initialize, shutdown
from s2train.planning import hybrid_layout
from s2train.validation.attention_kinds import require_feature

MODELING = "modeling_s2.py"
_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def export(cfg: ExportConfig) -> Path:
    """Write the folder `output` for Hugging Face's libraries.

    It holds config.json, .safetensors, the tokenizer's files, modeling_s2.py and the layout's mask files. A model
    without sparse layers and with full rotation is written as a Llama, or with `qk_norm` as Qwen3, which need no
    modelling file. The export runs in one process; the folder is written under a temporary name and renamed when
    complete.

    Raises:
        ConfigError: there is no checkpoint or tokenizer, the tokenizer is another one, the format can't hold a kind of
            attention or a weight, the folder exists, or the vocabulary is out of range.
    """
    path, output = find_checkpoint(cfg.checkpoint), Path(cfg.output)
    trained = read_config(path)
    remedy = "Export a model without such layers"
    require_feature(hybrid_layout(trained), Feature.EXPORT, "checkpoint", path, remedy)
    require_safetensors("output", cfg.output)
    if os.path.exists(output):
        raise ConfigError("output", output, "it exists", "Name a folder that doesn't")
    check_writable("output", cfg.output)
    tokenizer = load_tokenizer(cfg.tokenizer or trained.data.tokenizer, "tokenizer", trained.data.end_token)
    check_tokenizer(path, tokenizer)
    rows = trained.model.vocab_size if cfg.vocab_size is None else cfg.vocab_size
    if not tokenizer.vocab_size <= rows <= trained.model.vocab_size:
        problem = f"the tokenizer has {tokenizer.vocab_size} ids, the model {trained.model.vocab_size} rows"
        raise ConfigError("vocab_size", rows, problem, "Set it between these, or leave it out")

    # transformer-engine's layers name their norms differently
    loaded = load_for_inference(path, initialize(ParallelConfig(), trained.seed), layer_backend="local")
    state = unwrap(loaded.model).state_dict()
    if unknown := unknown_weights(state, trained.model):
        problem = f"its model has weights that the format has no place for, such as {unknown[0]}"
        raise ConfigError("checkpoint", path, problem, "Export a model without them")
    weights = to_llama(state, trained.model)
    for name in (EMBEDDING, OUTPUT):
        if name in weights:
            weights[name] = with_rows(weights[name], rows)
    temporary = output.with_name(f".{output.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    config = llama_config(trained, rows, tokenizer)
    config[KEY] = settings_json(trained, temporary, not isinstance(tokenizer, FileTokenizer))
    (temporary / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if "layout" in config:
        shutil.copyfile(Path(__file__).with_name(MODELING), temporary / MODELING)
    write_tokenizer(temporary, tokenizer, trained.train.seq_length)
    write_weights(temporary, weights)
    temporary.rename(output)
    shutdown()
    return output


def llama_config(cfg: PretrainConfig, vocab_size: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return `config.json`: a Llama's or Qwen3's settings, and the layout if needed.

    Qwen3 is a Llama with `qk_norm`. The layout is included if layers are sparse or rotation is partial.
    """
    model, hybrid = cfg.model, hybrid_layout(cfg)
    is_plain = all(isinstance(layer.kind, DenseKind) for layer in hybrid.layers) and model.rotary_percent == 1
    own: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if model.qk_norm:
        own = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    if not is_plain:
        names = {"AutoConfig": "S2Config", "AutoModelForCausalLM": "S2ForCausalLM"}
        own = {
            "architectures": ["S2ForCausalLM"],
            "model_type": "s2_llama",
            "auto_map": {name: f"{Path(MODELING).stem}.{value}" for name, value in names.items()},
            "qk_norm": model.qk_norm,
        }
    scaling = to_hugging_face(model.rope_scaling)
    return own | {
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": head_dim(model),
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": float(model.rotary_base),
        "partial_rotary_factor": model.rotary_percent,
        **({} if scaling is None else {"rope_scaling": scaling}),
        "max_position_embeddings": longest_length(model, cfg.train.seq_length),
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": model.init_std,
        "torch_dtype": _DTYPES[cfg.train.precision],
        "bos_token_id": None,
        "eos_token_id": tokenizer.eod,
        **({} if is_plain else {"layout": layout_json(hybrid)}),
    }
