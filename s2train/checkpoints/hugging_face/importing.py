"""Import a Llama, a Qwen3 or an export as a checkpoint."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from s2train.checkpoints.async_writers import start_results_manager
from s2train.checkpoints.folders import Progress, write_config
from s2train.checkpoints.hugging_face.config import ImportConfig
from s2train.checkpoints.hugging_face.folder import WeightsFolder, require_safetensors
from s2train.checkpoints.hugging_face.layout_json import layout_json
from s2train.checkpoints.hugging_face.llama_config import EXPORT, check_weights, llama_model
from s2train.checkpoints.hugging_face.run_settings import (
    KEY,
    ModelFiles,
    copy_masks,
    damaged,
    model_name,
    read_settings,
)
from s2train.checkpoints.hugging_face.tokenizer_files import TOKENIZER
from s2train.checkpoints.hugging_face.weights import EMBEDDING, OUTPUT, from_llama, llama_shapes, with_rows
from s2train.checkpoints.integrity import CONFIG, PROGRESS
from s2train.checkpoints.listing import checkpoint_at
from s2train.checkpoints.masks import mask_digests
from s2train.checkpoints.shards import sharding_metadata
from s2train.config import (
    DataConfig,
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
from s2train.errors import ConfigError
from s2train.files import check_writable
from s2train.megatron.compat import save_checkpoint_shards
from s2train.megatron.layer_backends import backend_of
from s2train.megatron.model import build_model, transformer_config, unwrap
from s2train.megatron.setup import initialize, shutdown
from s2train.planning import hybrid_layout
from s2train.validation.values import check_choice

_LONGEST = 8192  # default limit of the sequence length, in tokens; a run can set more


def import_llama(cfg: ImportConfig) -> tuple[Path, ModelFiles]:
    """Write the checkpoint OUTPUT/checkpoints/iter_0000000 and settings to train from it.

    The checkpoint has only weights. A run with `checkpoint.resume=OUTPUT` starts from it at step 0, with any layout,
    optimizer and parallel division. Rows that `vocab_size` adds are zeros. From an export of launch/export.py the
    layout and the tokenizer are imported too.

    Raises:
        ConfigError: the folder or weights are missing, the architecture is neither a plain Llama nor Qwen3 nor an
            export, or the output exists.
    """
    require_safetensors("weights", cfg.weights)
    folder = WeightsFolder(Path(cfg.weights), "weights")
    model = _model(cfg, folder)
    output = Path(cfg.output)
    if os.path.exists(cfg.output):
        raise ConfigError("output", cfg.output, "it exists", "Name a folder that doesn't")
    check_writable("output", cfg.output)

    run, is_export = _run_settings(cfg, folder, model)
    first = replace(run, train=replace(run.train, seq_length=min(run.train.seq_length, _LONGEST)))
    files = ModelFiles(first, cfg.conf, is_export)
    final = checkpoint_at(output, 0)
    temporary = final.with_name(f".{final.name}.partial")
    temporary.mkdir(parents=True)
    try:
        copy_masks(run.layout, folder.path)
        _check_layout(folder, run)
    except BaseException:
        shutil.rmtree(output)
        raise
    if (folder.path / TOKENIZER).is_file():
        shutil.copyfile(folder.path / TOKENIZER, output / TOKENIZER)
    device = initialize(ParallelConfig(), run.seed)
    _write_checkpoint(folder, run, device, temporary)
    temporary.rename(final)
    files.write()
    shutdown()
    return final, files


def _model(cfg: ImportConfig, folder: WeightsFolder) -> ModelConfig:
    """Read the model's shape, with the vocabulary that is asked for."""
    model = llama_model(folder)
    check_weights(folder, model)
    if cfg.precision not in DTYPES:
        raise ConfigError("precision", cfg.precision, "unknown value", f"Set it to one of {', '.join(DTYPES)}")
    if cfg.vocab_size is not None:
        if cfg.vocab_size < model.vocab_size:
            problem = f"the weights have {model.vocab_size} rows"
            raise ConfigError("vocab_size", cfg.vocab_size, problem, f"Set {model.vocab_size} or more")
        model.vocab_size = cfg.vocab_size
    model.name = model_name(Path(cfg.output))
    return model


def _run_settings(cfg: ImportConfig, folder: WeightsFolder, model: ModelConfig) -> tuple[PretrainConfig, bool]:
    """Make the settings of a run that trains from the checkpoint.

    Returns:
        the settings, and whether the weights are an export, which has a layout.
    """
    output = Path(cfg.output)
    length = int(folder.config.get("max_position_embeddings", 2048))
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
    return run, layout is not None


def _write_checkpoint(folder: WeightsFolder, run: PretrainConfig, device: torch.device, checkpoint: Path) -> None:
    """Write shards, settings and progress."""
    hybrid = hybrid_layout(run)
    (chunk,) = build_model(run, transformer_config(run), hybrid, backend_of(run), device)
    gpt = unwrap(chunk)
    weights = {name: folder.read(name) for name in llama_shapes(run.model)}
    for name in (EMBEDDING, OUTPUT):
        if name in weights:
            weights[name] = with_rows(weights[name], run.model.vocab_size)
    gpt.load_state_dict(_checked(from_llama(weights, run.model), gpt), strict=False)

    metadata = sharding_metadata()
    plain = {key: value for key, value in metadata.items() if isinstance(value, str)}
    with start_results_manager():  # Megatron's own would import everything again
        save_checkpoint_shards(
            {"model": gpt.sharded_state_dict(metadata=metadata)}, str(checkpoint), plain, in_background=False
        )
    write_config(run, checkpoint / CONFIG)
    progress = Progress(0, 0, {}, None, weights_only=True)
    progress = replace(progress, masks=mask_digests(hybrid), tokenizer=fingerprint(run.data.tokenizer))
    progress.write(checkpoint / PROGRESS)


def _layout(folder: WeightsFolder, output: Path) -> tuple[LayoutConfig, ScheduleConfig] | tuple[None, None]:
    """Return an export's layout; None for other weights, whose run chooses one."""
    if KEY in folder.config:
        return read_settings(folder.config[KEY], folder.path, output)
    if (folder.config.get("architectures") or [""])[0] == EXPORT:
        problem = "config.json has every head's blocks, but not the settings that they come from"
        raise ConfigError("weights", folder.path, problem, "Export the run again with this version")
    return None, None


def _check_layout(folder: WeightsFolder, run: PretrainConfig) -> None:
    """Check that an export's settings still produce the blocks in its config.json."""
    if KEY not in folder.config:
        return
    try:
        check_choice("schedule.placement", run.schedule.placement)
        hybrid = hybrid_layout(run)
    except ConfigError as error:
        raise damaged(folder.path, f".{error.setting}", error.value, error.problem) from error
    recorded = folder.config.get("layout")
    if recorded is None:
        return
    try:
        # the first exports have no number of their format, which is 1
        is_same = isinstance(recorded, dict) and layout_json(hybrid) == {"format": 1} | recorded
    except (NotImplementedError, TypeError):  # a kind of attention that no export has
        is_same = False
    if not is_same:
        problem = f"its settings ({KEY}.layout, {KEY}.schedule) give other blocks than its layout lists"
        raise ConfigError("weights", folder.path, problem, "Fix config.json, or export the run again")


def _tokenizer(folder: WeightsFolder, output: Path) -> str:
    """Return the value of `data.tokenizer`.

    If the weights bring no tokenizer, a run is rejected until one is set.
    """
    if folder.config.get(KEY, {}).get("tokenizer") == "bytes":
        return "bytes"
    return str(output.absolute() / TOKENIZER)


def _checked(weights: dict[str, torch.Tensor], gpt: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights after checking that they match the model's parameters exactly."""
    names = {name for name, _ in gpt.named_parameters()}
    assert names == set(weights), names ^ set(weights)
    return weights
