"""Reads the shape of a Llama or Qwen3; checks its weights."""

from math import isfinite
from typing import Any

from s2train.checkpoints.hugging_face.folder import WeightsFolder
from s2train.checkpoints.hugging_face.rope_scaling import from_hugging_face, rope_section
from s2train.checkpoints.hugging_face.weights import OUTPUT, llama_shapes
from s2train.config import ModelConfig
from s2train.errors import ConfigError, as_typed

EXPORT = "S2ForCausalLM"  # of launch/export.py
_QWEN3 = "Qwen3ForCausalLM"  # a Llama with `model.qk_norm`
_MISTRAL = "MistralForCausalLM"
_MISTRALS_WINDOW = 4096  # of transformers, where config.json has none
_ARCHITECTURES = ("LlamaForCausalLM", _MISTRAL, _QWEN3, EXPORT)
# Settings that would change the computation: config.json's name, and the value required if present.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
}
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("num_hidden_layers", "hidden_size", "intermediate_size"), (int,)),
    **dict.fromkeys(("num_attention_heads", "vocab_size"), (int,)),
    **dict.fromkeys(("num_key_value_heads", "head_dim"), (int, type(None))),
    "max_position_embeddings": (int,),
    **dict.fromkeys(("rms_norm_eps", "initializer_range", "rope_theta"), (int, float)),
    "partial_rotary_factor": (int, float, type(None)),
    "tie_word_embeddings": (bool,),
}


def llama_model(folder: WeightsFolder) -> ModelConfig:
    """Return the model shape in config.json.

    Raises:
        ConfigError: not a plain Llama, Qwen3 or an export: another architecture, biases, rotation scaled in another way
            or a sliding window; except in an export also partial rotation.
    """
    config, remedy = folder.config, "Only models without it can be imported"
    names = config.get("architectures") or ["none"]
    if not isinstance(names, list):
        raise ConfigError(
            "weights", folder.path, f"config.json has architectures={as_typed(names)}, not a list", remedy
        )
    if names[0] not in _ARCHITECTURES:
        raise ConfigError("weights", folder.path, f"its architecture is {names[0]}", f"{_list()} can be imported")
    rope = rope_section(config, "rope_parameters", folder.path)  # transformers 5 has theta and scaling here
    if names[0] == _QWEN3 and not config.get("use_sliding_window"):
        config = config | {"sliding_window": None}  # without effect, as in transformers
    if names[0] == _MISTRAL and "sliding_window" not in config:
        problem = f"config.json has no sliding_window, which transformers takes as {_MISTRALS_WINDOW}"
        raise ConfigError("weights", folder.path, problem, "Add sliding_window (null if the model has none)")
    for name, values in _PLAIN.items():
        if name in config and config[name] not in values:
            raise ConfigError("weights", folder.path, f"config.json has {name}={as_typed(config[name])}", remedy)
    for name, types in _TYPES.items():
        if name in config and type(config[name]) not in types:
            problem = f"config.json has {name}={as_typed(config[name])}, not a value of its type"
            raise ConfigError("weights", folder.path, problem, "Fix config.json")
    percent = config.get("partial_rotary_factor", rope.get("partial_rotary_factor")) or 1.0
    if percent != 1 and names[0] != EXPORT:
        raise ConfigError("weights", folder.path, f"config.json has partial_rotary_factor={percent}", remedy)
    theta = config.get("rope_theta", rope.get("rope_theta", 10_000))
    if type(theta) not in (int, float) or not isfinite(theta) or theta != int(theta):
        raise ConfigError("weights", folder.path, f"rope_theta={as_typed(theta)} is not an integer", remedy)
    if rope.get("rope_theta", theta) != theta:  # transformers 4 takes the one, 5 the other
        problem = f"config.json has rope_theta={as_typed(theta)} and rope_parameters.rope_theta={rope['rope_theta']}"
        raise ConfigError("weights", folder.path, problem, "Remove the one that the model wasn't trained with")
    try:
        heads = config["num_attention_heads"]
        model = ModelConfig(
            name=folder.path.resolve().name,
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim", 128 if names[0] == _QWEN3 else None),
            vocab_size=config["vocab_size"],
            rotary_base=int(theta),
            rotary_percent=float(percent),
            qk_norm=names[0] == _QWEN3 or bool(config.get("qk_norm")),
            norm_epsilon=config["rms_norm_eps"],
            init_std=config.get("initializer_range", 0.02),
            tie_embeddings=config.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        problem = f"config.json has no {error.args[0]}"
        raise ConfigError("weights", folder.path, problem, "Add it") from error
    model.rope_scaling = from_hugging_face(config, model, folder.path)
    return model


def check_weights(folder: WeightsFolder, model: ModelConfig) -> None:
    """Check that the weights are a plain Llama's of this shape.

    Raises:
        ConfigError: one is missing, has another shape, or is not a Llama's.
    """
    found, expected = folder.shapes, llama_shapes(model)
    extra = {name for name in found if not name.endswith("rotary_emb.inv_freq")} - set(expected)
    if model.tie_embeddings:
        extra -= {OUTPUT}  # a copy of the embedding
    if extra:
        kind = "Qwen3" if model.qk_norm else "Llama"
        problem = f"it has weights that a plain {kind} doesn't have, such as {min(extra)}"
        raise ConfigError("weights", folder.path, problem, f"{_list()} without biases can be imported")
    for name, shape in expected.items():
        if name not in found:
            raise ConfigError("weights", folder.path, f"it lacks {name}", "Download it again")
        if found[name] != shape:
            problem = f"{name} is {list(found[name])} where config.json says {list(shape)}"
            raise ConfigError("weights", folder.path, problem, "Fix config.json")


def _list() -> str:
    return ", ".join(_ARCHITECTURES)
