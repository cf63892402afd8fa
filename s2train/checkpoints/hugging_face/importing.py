"""Import the weights of a Llama or an export as a checkpoint."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from s2train.checkpoints.async_writers import start_results_manager
from s2train.checkpoints.folders import Progress, folder_name, write_config
from s2train.checkpoints.hugging_face.folder import WeightsFolder, require_safetensors
from s2train.checkpoints.hugging_face.layout_json import layout_json
from s2train.checkpoints.hugging_face.rope_scaling import from_hugging_face, rope_section
from s2train.checkpoints.hugging_face.run_settings import KEY, ModelFiles, copy_masks, model_name, read_settings
from s2train.checkpoints.hugging_face.tokenizer_files import TOKENIZER
from s2train.checkpoints.hugging_face.weights import EMBEDDING, OUTPUT, from_llama, llama_shapes, with_rows
from s2train.checkpoints.integrity import CONFIG, PROGRESS
from s2train.checkpoints.masks import mask_digests
from s2train.checkpoints.shards import sharding_metadata
from s2train.config import (
    DataConfig,
    ImportConfig,
    LayoutConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PretrainConfig,
    ScheduleConfig,
    TrainConfig,
)
from s2train.data.tokenizers import fingerprint
from s2train.environment.dtypes import DTYPES
from s2train.errors import ConfigError, as_typed
from s2train.files import check_writable
from s2train.megatron.compat import save_checkpoint_shards
from s2train.megatron.layer_backends import backend_of
from s2train.megatron.model import build_model, transformer_config, unwrap
from s2train.megatron.setup import initialize, shutdown
from s2train.planning import hybrid_layout

_HYBRID = "S2ForCausalLM"  # of launch/export.py
_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", _HYBRID)
_LONGEST = 8192  # default limit of the sequence length, in tokens; a run can set more
# Settings that would change the computation: config.json's name, and the value required if present.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
}
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("num_hidden_layers", "hidden_size", "intermediate_size"), (int,)),
    **dict.fromkeys(("num_attention_heads", "vocab_size"), (int,)),
    **dict.fromkeys(("num_key_value_heads", "head_dim"), (int, type(None))),
    **dict.fromkeys(("rms_norm_eps", "initializer_range", "rope_theta"), (int, float)),
    "partial_rotary_factor": (int, float, type(None)),
}


def import_llama(cfg: ImportConfig) -> tuple[Path, ModelFiles]:
    """Write the checkpoint OUTPUT/checkpoints/iter_0000000 and settings to train from it.

    The checkpoint has only weights. A run with `checkpoint.resume=OUTPUT` starts from it at step 0, with any layout,
    optimizer and parallel division. Rows that `vocab_size` adds are zeros. From an export of launch/export.py the
    layout and the tokenizer are imported too.

    Raises:
        ConfigError: the folder or weights are missing, the architecture is neither a plain Llama nor an export, or the
            output exists.
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
    if os.path.exists(cfg.output):
        raise ConfigError("output", cfg.output, "it exists", "Name a folder that doesn't")
    check_writable("output", cfg.output)

    output, length = Path(cfg.output), int(folder.config.get("max_position_embeddings", 2048))
    model.name = model_name(output)
    layout, schedule = _layout(folder, output)
    run = PretrainConfig(
        model=model,
        layout=layout or LayoutConfig(layers="D"),
        schedule=schedule or ScheduleConfig(),
        data=DataConfig(tokenizer=_tokenizer(folder, output), end_token=folder.config.get(KEY, {}).get("end_token")),
        optim=OptimConfig(lr=3e-5),
        train=TrainConfig(steps=1000, seq_length=length, global_batch_size=16, precision=cfg.precision),
        run_dir=cfg.output,
        layer_backend="local",  # its parameters have plain names; runs with other backends can read the checkpoint
    )
    first = replace(run, train=replace(run.train, seq_length=min(length, _LONGEST)))
    files = ModelFiles(first, cfg.conf, layout is not None)
    temporary = final.with_name(f".{final.name}.partial")
    temporary.mkdir(parents=True)
    try:
        copy_masks(run.layout, folder.path)
        _check_layout(folder, run)
    except (ConfigError, OSError):
        shutil.rmtree(output)
        raise
    device = initialize(ParallelConfig(), run.seed)
    hybrid = hybrid_layout(run)
    (chunk,) = build_model(run, transformer_config(run), hybrid, backend_of(run), device)
    gpt = unwrap(chunk)
    weights = {name: folder.read(name) for name in llama_shapes(model)}
    for name in (EMBEDDING, OUTPUT):
        if name in weights:
            weights[name] = with_rows(weights[name], model.vocab_size)
    gpt.load_state_dict(_checked(from_llama(weights, model), gpt), strict=False)

    metadata = sharding_metadata()
    plain = {key: value for key, value in metadata.items() if isinstance(value, str)}
    with start_results_manager():  # Megatron's own would import everything again
        save_checkpoint_shards(
            {"model": gpt.sharded_state_dict(metadata=metadata)}, str(temporary), plain, in_background=False
        )
    write_config(run, temporary / CONFIG)
    if (folder.path / TOKENIZER).is_file():
        shutil.copyfile(folder.path / TOKENIZER, output / TOKENIZER)
    progress = Progress(0, 0, {}, None, weights_only=True)
    progress = replace(progress, masks=mask_digests(hybrid), tokenizer=fingerprint(run.data.tokenizer))
    progress.write(temporary / PROGRESS)
    temporary.rename(final)
    files.write()
    shutdown()
    return final, files


def _layout(folder: WeightsFolder, output: Path) -> tuple[LayoutConfig, ScheduleConfig] | tuple[None, None]:
    """Return an export's layout; None for other weights, whose run chooses one."""
    if KEY in folder.config:
        return read_settings(folder.config[KEY], folder.path, output)
    if (folder.config.get("architectures") or [""])[0] == _HYBRID:
        problem = "config.json has every head's blocks, but not the settings that they come from"
        raise ConfigError("weights", folder.path, problem, "Export the run again with this version")
    return None, None


def _check_layout(folder: WeightsFolder, run: PretrainConfig) -> None:
    """Check that an export's settings still produce the blocks in its config.json."""
    recorded = folder.config.get("layout")
    # the first exports have no number of their format, which is 1
    if recorded is not None and layout_json(hybrid_layout(run)) != {"format": 1} | recorded:
        problem = f"its settings ({KEY}.layout, {KEY}.schedule) give other blocks than its layout lists"
        raise ConfigError("weights", folder.path, problem, "Fix config.json, or export the run again")


def _tokenizer(folder: WeightsFolder, output: Path) -> str:
    """Return the value of `data.tokenizer`.

    If the weights bring no tokenizer, a run is rejected until one is set.
    """
    if folder.config.get(KEY, {}).get("tokenizer") == "bytes":
        return "bytes"
    return str(output.absolute() / TOKENIZER)


def llama_model(folder: WeightsFolder) -> ModelConfig:
    """Return the model shape in config.json.

    Raises:
        ConfigError: not a plain Llama or an export: another architecture, biases, rotation scaled in another way or a
            sliding window; in a plain Llama also partial rotation.
    """
    config, remedy = folder.config, "Only Llama's architecture without these can be imported"
    names = config.get("architectures") or ["none"]
    if names[0] not in _ARCHITECTURES:
        raise ConfigError("weights", folder.path, f"its architecture is {names[0]}", f"{_list()} can be imported")
    rope = rope_section(config, "rope_parameters", folder.path)  # transformers 5 has theta and scaling here
    for name, values in _PLAIN.items():
        if name in config and config[name] not in values:
            raise ConfigError("weights", folder.path, f"config.json has {name}={as_typed(config[name])}", remedy)
    for name, types in _TYPES.items():
        if name in config and type(config[name]) not in types:
            problem = f"config.json has {name}={as_typed(config[name])}, not a number of its type"
            raise ConfigError("weights", folder.path, problem, "Fix config.json")
    percent = config.get("partial_rotary_factor", rope.get("partial_rotary_factor")) or 1.0
    if percent != 1 and names[0] != _HYBRID:
        raise ConfigError("weights", folder.path, f"config.json has partial_rotary_factor={percent}", remedy)
    theta = float(config.get("rope_theta", rope.get("rope_theta", 10_000)))
    if theta != int(theta):
        raise ConfigError("weights", folder.path, f"rope_theta={theta} is not an integer", remedy)
    try:
        heads = config["num_attention_heads"]
        model = ModelConfig(
            name=folder.path.resolve().name,
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim"),
            vocab_size=config["vocab_size"],
            rotary_base=int(theta),
            rotary_percent=float(percent),
            norm_epsilon=config["rms_norm_eps"],
            init_std=config.get("initializer_range", 0.02),
            tie_embeddings=config.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        problem = f"config.json has no {error.args[0]}"
        raise ConfigError("weights", folder.path, problem, "Add it") from error
    model.rope_scaling = from_hugging_face(config, model, folder.path)
    return model


def _check_weights(folder: WeightsFolder, model: ModelConfig) -> None:
    found, expected = folder.shapes, llama_shapes(model)
    extra = {name for name in found if not name.endswith("rotary_emb.inv_freq")} - set(expected)
    if model.tie_embeddings:
        extra -= {OUTPUT}  # a copy of the embedding
    if extra:
        problem = f"it has weights that a plain Llama doesn't have, such as {min(extra)}"
        raise ConfigError("weights", folder.path, problem, f"{_list()} without biases can be imported")
    for name, shape in expected.items():
        if name not in found:
            raise ConfigError("weights", folder.path, f"it lacks {name}", "Download it again")
        if found[name] != shape:
            problem = f"{name} is {list(found[name])} where config.json says {list(shape)}"
            raise ConfigError("weights", folder.path, problem, "Fix config.json")


def _checked(weights: dict[str, torch.Tensor], gpt: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights after checking that they match the model's parameters exactly."""
    names = {name for name, _ in gpt.named_parameters()}
    assert names == set(weights), names ^ set(weights)
    return weights


def _list() -> str:
    return ", ".join(_ARCHITECTURES)
