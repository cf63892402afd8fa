"""Rejects features that a kind of attention doesn't support.

The features are those that a run or a program asks for.
"""

from collections.abc import Iterator
from dataclasses import fields
from itertools import islice
from math import isfinite

from s2train.attention.features import Feature
from s2train.attention.hybrid import HybridLayout
from s2train.attention.kind import AttentionKind, lacking
from s2train.attention.teacher import teacher_setting
from s2train.config import PretrainConfig
from s2train.costs.parameters import attention_shape
from s2train.environment.hardware import Hardware
from s2train.environment.transformer_engine import uses_te
from s2train.errors import ConfigError


def check_kinds(cfg: PretrainConfig, hybrid: HybridLayout, hardware: Hardware) -> None:
    """Check that the layout's kinds support what the run asks for.

    Raises:
        ConfigError: a kind lacks a feature that a setting asks for, or rejects the settings itself; or layers name
            several teachers.
    """
    require_tensor_parallel(hybrid, cfg.parallel.tp, "parallel.tp")
    for feature, setting, value, without in _asked(cfg, hardware):
        require_feature(hybrid, feature, setting, value, without)
    _check_dense_heads(cfg, hybrid)
    teacher_setting(hybrid.layers)
    for kind in dict.fromkeys(layer.kind for layer in hybrid.layers):
        kind.check(cfg)
        _check_loss_weights(kind)
        _check_weights(cfg, kind)
    frozen, shape = cfg.train.freeze_trunk_steps, attention_shape(cfg.model)
    if frozen and not any(layer.kind.weights(shape) for layer in hybrid.layers):
        problem = "no layer's kind of attention adds weights, so nothing would learn"
        raise ConfigError("train.freeze_trunk_steps", frozen, problem, "Set 0, or use such a kind in layout.layers.")


def _check_dense_heads(cfg: PretrainConfig, hybrid: HybridLayout) -> None:
    """Reject dense heads if the data choose what all sparse layers read."""
    sparse = [layer for layer in hybrid.layers if not layer.is_dense]
    if cfg.schedule.dense_heads and sparse and not any(layer.is_static for layer in sparse):
        kind, remedy = sparse[0].kind, "Set 0, or other letters in layout.layers."
        problem = f"{kind.label} attention (letter {kind.letter}) has no dense heads"
        raise ConfigError("schedule.dense_heads", cfg.schedule.dense_heads, problem, remedy)


def require_feature(hybrid: HybridLayout, feature: Feature, setting: str, value: object, without: str) -> None:
    """Check that all layers support a feature, before anything is built.

    Args:
        setting, value: that ask for it.
        without: the remedy that leaves it out.
    Raises:
        ConfigError: a kind doesn't; names it and its letter.
    """
    for kind in lacking(hybrid.layers, feature):
        problem = f"{kind.label} attention (letter {kind.letter}) doesn't support {feature.value}"
        others = "another kind of attention in layout.layers"
        raise ConfigError(setting, value, problem, f"{without.rstrip('.')}, or use {others}.")


def require_tensor_parallel(hybrid: HybridLayout, tp: int, setting: str) -> None:
    """Check that all layers' kinds of attention support `tp` tensor parallel ranks.

    Raises:
        ConfigError: on `setting`, the name of tp on the command line.
    """
    if tp > 1:
        require_feature(hybrid, Feature.TENSOR_PARALLEL, setting, tp, f"Set {setting}=1")
    if tp > (groups := hybrid.num_query_groups):
        require_feature(hybrid, Feature.SHARED_KV_HEADS, setting, tp, f"Set {setting}={groups} or less")


def _asked(cfg: PretrainConfig, hardware: Hardware) -> Iterator[tuple[Feature, str, object, str]]:
    """Yield the features that a run's settings ask for.

    Each comes with the setting, its value, and how to do without the feature.
    """
    parallel, train = cfg.parallel, cfg.train
    for name, feature in (("pp", Feature.PIPELINE_PARALLEL), ("cp", Feature.CONTEXT_PARALLEL)):
        if (ranks := getattr(parallel, name)) > 1:
            yield feature, f"parallel.{name}", ranks, f"Set parallel.{name}=1"
    if parallel.sequence_parallel:
        remedy = "Set parallel.sequence_parallel=false"
        yield Feature.SEQUENCE_PARALLEL, "parallel.sequence_parallel", True, remedy
    if cfg.data.attention_within_documents:
        remedy = "Set data.attention_within_documents=false"
        yield Feature.PACKED_DOCUMENTS, "data.attention_within_documents", True, remedy
    if train.recompute in ("selective", "full"):  # mlp repeats no attention
        yield Feature.RECOMPUTATION, "train.recompute", train.recompute, "Set train.recompute=none or mlp"
    if train.deterministic:
        yield Feature.DETERMINISTIC, "train.deterministic", True, "Set train.deterministic=false"
    if cfg.fp8 != "none":
        yield Feature.FP8, "fp8", cfg.fp8, "Set fp8=none"
    if cfg.layer_backend == "te" or uses_te(cfg, hardware):
        yield Feature.TRANSFORMER_ENGINE, "layer_backend", cfg.layer_backend, "Set layer_backend=local"


def _check_loss_weights(kind: AttentionKind) -> None:
    """Check that weights of the kind's auxiliary losses are finite and nonnegative."""
    for name, weight in kind.columns().items():
        if weight is None or (isfinite(weight) and weight >= 0):
            continue
        of_loss = (field.name for field in fields(kind.settings) if getattr(kind.settings, field.name) is weight)
        setting = ".".join([kind.setting, *islice(of_loss, 1)])
        problem = f"weighs the auxiliary loss {name} of {kind.label} attention"
        raise ConfigError(setting, weight, problem, "Set a finite number, 0 or more.")


def _check_weights(cfg: PretrainConfig, kind: AttentionKind) -> None:
    """Whether tensor parallel ranks can divide the weights that the kind adds."""
    tp = cfg.parallel.tp
    for weight in kind.weights(attention_shape(cfg.model)):
        if weight.split is not None and weight.shape[weight.split] % tp:
            size = weight.shape[weight.split]
            problem = f"doesn't divide dimension {weight.split}, of {size}, of {kind.label} attention's {weight.name}"
            raise ConfigError("parallel.tp", tp, problem, f"Set parallel.tp to a divisor of {size}.")
