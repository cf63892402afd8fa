"""A Llama's weights as a checkpoint that a run starts from."""

import shutil
from pathlib import Path
from typing import Any

import torch

from s2train.config import ImportConfig, LayoutConfig, ModelConfig, ParallelConfig, PretrainConfig, TrainConfig
from s2train.errors import ConfigError
from s2train.export.folder import WeightsFolder, require_safetensors
from s2train.export.weights import EMBEDDING, OUTPUT, from_llama, llama_shapes, with_rows
from s2train.megatron.backends import choose_backend
from s2train.megatron.checkpoint import Progress, folder_name, sharding_metadata, write_config
from s2train.megatron.compat import save_checkpoint_shards
from s2train.megatron.integrity import CONFIG, PROGRESS
from s2train.megatron.model import DTYPES, build_model, transformer_config, unwrap
from s2train.megatron.setup import initialize, shutdown
from s2train.planning import hybrid_layout

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
# What would change the computation: config.json's name, and what it must be where it is there.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}


def import_llama(cfg: ImportConfig) -> tuple[Path, ModelConfig]:
    """Write OUTPUT/checkpoints/iter_0000000, a checkpoint of weights alone; returns it and the model's shape.

    A run with `checkpoint.resume=OUTPUT` starts from it at step 0, under any layout, optimizer and division. Rows
    that `vocab_size` adds are zeros.

    Raises:
        ConfigError: no such folder or weights, an architecture that is no plain Llama, an output that exists.
    """
    require_safetensors("weights", cfg.weights)
    folder = WeightsFolder(Path(cfg.weights), "weights")
    model = llama_model(folder)
    _check_weights(folder, model)
    if cfg.precision not in DTYPES:
        raise ConfigError("precision", cfg.precision, "unknown value", f"Set it to one of {', '.join(DTYPES)}")
    if cfg.vocab_size is not None:
        if cfg.vocab_size < model.vocab_size:
            problem = f"the weights have {model.vocab_size} rows"
            raise ConfigError("vocab_size", cfg.vocab_size, problem, f"Set {model.vocab_size} or more")
        model.vocab_size = cfg.vocab_size
    final = Path(cfg.output) / "checkpoints" / folder_name(0)
    if Path(cfg.output).exists():
        raise ConfigError("output", cfg.output, "it exists", "Name a folder that doesn't")

    length = int(folder.config.get("max_position_embeddings", 2048))
    run = PretrainConfig(
        model=model,
        layout=LayoutConfig(layers="D"),
        train=TrainConfig(steps=1, seq_length=length, global_batch_size=1, precision=cfg.precision),
        run_dir=cfg.output,
        backend="local",  # whose parameters have plain names; a run with another reads the checkpoint
    )
    device = initialize(ParallelConfig(), run.seed)
    (chunk,) = build_model(run, transformer_config(run), hybrid_layout(run), choose_backend(run.backend), device)
    gpt = unwrap(chunk)
    weights = {name: folder.read(name) for name in llama_shapes(model)}
    for name in (EMBEDDING, OUTPUT):
        if name in weights:
            weights[name] = with_rows(weights[name], model.vocab_size)
    gpt.load_state_dict(_checked(from_llama(weights, model), gpt), strict=False)

    temporary = final.with_name(f".{final.name}.partial")
    temporary.mkdir(parents=True)
    metadata = sharding_metadata()
    plain = {key: value for key, value in metadata.items() if isinstance(value, str)}
    save_checkpoint_shards(
        {"model": gpt.sharded_state_dict(metadata=metadata)}, str(temporary), plain, in_background=False
    )
    write_config(run, temporary / CONFIG)
    Progress(0, 0, {}, None, weights_only=True).write(temporary / PROGRESS)
    if (Path(cfg.weights) / "tokenizer.json").is_file():
        shutil.copyfile(Path(cfg.weights) / "tokenizer.json", Path(cfg.output) / "tokenizer.json")
    temporary.rename(final)
    shutdown()
    return final, model


def llama_model(folder: WeightsFolder) -> ModelConfig:
    """The shape that config.json tells of.

    Raises:
        ConfigError: no plain Llama: another architecture, biases, scaled or partial rotation, a sliding window.
    """
    config, remedy = folder.config, "Only Llama's architecture without these can be imported"
    names = config.get("architectures") or ["none"]
    if names[0] not in _ARCHITECTURES:
        raise ConfigError("weights", folder.path, f"its architecture is {names[0]}", f"{_list()} can be imported")
    rope = config.get("rope_parameters") or {}  # where transformers 5 has theta and scaling
    if rope.get("rope_type", "default") != "default":
        raise ConfigError("weights", folder.path, f"config.json has rope_parameters={rope}", remedy)
    for name, values in _PLAIN.items():
        if name in config and config[name] not in values:
            raise ConfigError("weights", folder.path, f"config.json has {name}={config[name]}", remedy)
    theta = float(config.get("rope_theta", rope.get("rope_theta", 10_000)))
    if theta != int(theta):
        raise ConfigError("weights", folder.path, f"rope_theta={theta} is no whole number", remedy)
    try:
        heads = config["num_attention_heads"]
        return ModelConfig(
            name=folder.path.resolve().name,
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim"),
            vocab_size=config["vocab_size"],
            rotary_base=int(theta),
            norm_epsilon=config["rms_norm_eps"],
            init_std=config.get("initializer_range", 0.02),
            tie_embeddings=config.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        problem = f"config.json has no {error.args[0]}"
        raise ConfigError("weights", folder.path, problem, "Add it") from error


def _check_weights(folder: WeightsFolder, model: ModelConfig) -> None:
    found, expected = folder.shapes, llama_shapes(model)
    extra = {name for name in found if not name.endswith("rotary_emb.inv_freq")} - set(expected)
    if model.tie_embeddings:
        extra -= {OUTPUT}  # a copy of the embedding
    if extra:
        problem = f"it has weights that a plain Llama has not, such as {min(extra)}"
        raise ConfigError("weights", folder.path, problem, f"{_list()} without biases can be imported")
    for name, shape in expected.items():
        if name not in found:
            raise ConfigError("weights", folder.path, f"it lacks {name}", "Download it again")
        if found[name] != shape:
            problem = f"{name} is {list(found[name])} where config.json tells of {list(shape)}"
            raise ConfigError("weights", folder.path, problem, "Mend config.json")


def _checked(weights: dict[str, torch.Tensor], gpt: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights, which are all of the model's parameters and nothing else."""
    names = {name for name, _ in gpt.named_parameters()}
    assert names == set(weights), names ^ set(weights)
    return weights


def run_settings(model: ModelConfig) -> list[str]:
    """Command-line settings of a run with this model, of whatever name."""
    values = {name: value for name, value in vars(model).items() if name not in ("name", "init_std")}
    shown = {
        name: str(value).lower() if isinstance(value, bool) or value is None else value
        for name, value in values.items()
    }
    return [f"model.{name}={'null' if value == 'none' else value}" for name, value in shown.items()]


def _list() -> str:
    return " and ".join(_ARCHITECTURES)
