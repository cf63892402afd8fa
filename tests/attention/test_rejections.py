"""What a kind of attention doesn't support is rejected before anything is built; so is what its settings can't be."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from s2train.attention.dense import DenseKind, DenseSettings
from s2train.attention.features import Feature
from s2train.attention.hybrid import build_hybrid_layout
from s2train.attention.kind import DataDependentKind, HeadsOf, StaticKind
from s2train.attention.registry import KINDS, register
from s2train.checkpoints.folders import write_config
from s2train.checkpoints.hugging_face import exporting
from s2train.checkpoints.hugging_face.config import ExportConfig
from s2train.checkpoints.hugging_face.weights import to_llama, unknown_weights
from s2train.config import LayoutConfig, PretrainConfig, ScheduleConfig
from s2train.costs.parameters import attention_shape
from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.inference import decode_speed
from s2train.layouts.patterns import Dense
from s2train.needles.config import NeedleConfig
from s2train.needles.request import read_request
from s2train.planning import check, compose_run, format_plan, hybrid_layout, make_plan
from s2train.planning.config import ShowLayoutConfig
from s2train.planning.show import show
from s2train.probes import evaluate_checkpoint as probes
from s2train.probes.config import ProbesConfig
from tests.attention.toy import ShyKind, ToyKind

CPU = Hardware("CPU", "cpu", 1 << 36, None)
GPU = Hardware("NVIDIA H100 80GB HBM3", "cuda", 80 << 30, None, (9, 0))


@pytest.fixture(autouse=True)
def kinds() -> Iterator[None]:
    register(ToyKind)
    register(ShyKind)
    yield
    del KINDS["toy"], KINDS["shy"]


def config(kind: str, *settings: str, layers: str = "DT") -> PretrainConfig:
    letter = f"+layout.kinds.T={kind if kind.startswith('{') else f'{{kind:{kind}}}'}"
    return compose_run(["+model=tiny_hybrid", f"layout.layers={layers}", letter, *settings])


@pytest.mark.parametrize(
    ("feature", "settings", "world_size", "setting"),
    [
        (Feature.TENSOR_PARALLEL, ["parallel.tp=2"], 2, "parallel.tp=2"),
        (Feature.SHARED_KV_HEADS, ["parallel.tp=4"], 4, "parallel.tp=4"),
        (
            Feature.SEQUENCE_PARALLEL,
            ["parallel.tp=2", "parallel.sequence_parallel=true"],
            2,
            "parallel.sequence_parallel=true",
        ),
        (Feature.PIPELINE_PARALLEL, ["parallel.pp=2"], 2, "parallel.pp=2"),
        (Feature.CONTEXT_PARALLEL, ["parallel.cp=2"], 2, "parallel.cp=2"),
        (
            Feature.PACKED_DOCUMENTS,
            ["data.attention_within_documents=true"],
            1,
            "data.attention_within_documents=true",
        ),
        (Feature.RECOMPUTATION, ["train.recompute=selective"], 1, "train.recompute=selective"),
        (Feature.DETERMINISTIC, ["train.deterministic=true"], 1, "train.deterministic=true"),
    ],
)
def test_a_run_that_asks_for_what_a_kind_lacks_is_rejected(
    feature: Feature, settings: list[str], world_size: int, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShyKind, "features", frozenset(Feature) - {feature})
    with pytest.raises(ConfigError) as raised:
        check(config("shy", *settings), world_size, CPU)
    assert str(raised.value).startswith(f"{setting}: shy attention (letter T) doesn't support {feature.value}")


def test_transformer_engines_layers_and_fp8_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    from s2train.validation.attention_kinds import check_kinds

    cfg = config("shy", "fp8=hybrid")
    for feature, setting in ((Feature.FP8, "fp8=hybrid"), (Feature.TRANSFORMER_ENGINE, "layer_backend=")):
        monkeypatch.setattr(ShyKind, "features", frozenset(Feature) - {feature})
        if feature is Feature.TRANSFORMER_ENGINE:
            cfg = config("shy", "layer_backend=te")
        with pytest.raises(ConfigError, match=f"^{setting}.*doesn't support {feature.value}"):
            check_kinds(cfg, hybrid_layout(cfg), GPU)


def test_a_run_that_asks_for_nothing_more_is_planned() -> None:
    cfg = config("shy")
    text = format_plan(check(cfg, 1, CPU))
    assert "layers        4: DTx2 (2 dense, 2 sparse)" in text
    assert "T           shy, keys chosen by the data: expected density 0.5" in text
    assert "expected, where the data choose" in text
    assert "layers 1, 3: not defined, shy attention reads what the data choose" in text
    planned = make_plan(replace(cfg, train=replace(cfg.train, precision="bf16")), hybrid_layout(cfg), 1, GPU)
    assert planned.prediction is None


def test_a_plan_names_consecutive_layers_as_a_range() -> None:
    text = format_plan(check(config("shy", "model.num_layers=6", layers="DTTTDT"), 1, CPU))
    assert "layers 1-3, 5: not defined" in text


def checkpoint_of(cfg: PretrainConfig, folder: Path) -> Path:
    """A checkpoint's folder with settings alone: what is rejected is so before its shards are read."""
    checkpoint = folder / "checkpoints" / "iter_0000001"
    checkpoint.mkdir(parents=True)
    write_config(cfg, checkpoint / "config.yaml")
    return checkpoint


def test_export_is_rejected(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(config("shy"), tmp_path)
    with pytest.raises(ConfigError, match=r"^checkpoint=.*shy attention .* doesn't support export"):
        exporting.export(ExportConfig(str(checkpoint), str(tmp_path / "out")))


def test_needles_of_a_kind_without_decoding_are_rejected(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(config("shy"), tmp_path)
    with pytest.raises(ConfigError, match=r"^checkpoint=.*shy attention .* doesn't support decoding"):
        read_request(NeedleConfig(str(checkpoint)), 1, CPU)


def test_probes_of_a_kind_without_decoding_are_rejected(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(config("shy"), tmp_path)
    with pytest.raises(ConfigError, match=r"^checkpoint=.*shy attention .* doesn't support decoding"):
        probes.read_request(ProbesConfig(checkpoint=str(checkpoint)), 1, CPU)


def test_decoding_speed_of_a_kind_without_decoding_is_not_measured() -> None:
    settings = ["+model=tiny_hybrid", "layout.layers=DT", "+layout.kinds.T={kind:shy}"]
    with pytest.raises(ConfigError, match=r"^layout.layers=DT: shy attention .* doesn't support decoding"):
        decode_speed.main(settings)


def test_dense_heads_in_layers_that_have_none_are_rejected() -> None:
    with pytest.raises(ConfigError, match=r"^schedule.dense_heads=2: toy attention \(letter T\) has no dense heads"):
        check(config("toy", "schedule.dense_heads=2"), 1, CPU)
    check(config("toy", "schedule.dense_heads=2", layers="DSTT"), 1, CPU)  # S layers have them


def test_needles_on_tensor_parallel_ranks_that_a_kind_lacks_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShyKind, "features", frozenset({Feature.DECODING}))
    checkpoint = checkpoint_of(config("shy"), tmp_path)
    with pytest.raises(ConfigError, match=r"^tp=2: shy attention .* doesn't support tensor parallel"):
        read_request(NeedleConfig(str(checkpoint), tp=2), 2, CPU)


def test_a_picture_of_what_the_data_choose_is_rejected(tmp_path: Path) -> None:
    cfg = config("toy")
    shown = ShowLayoutConfig(**{name: getattr(cfg, name) for name in cfg.__dataclass_fields__}, output=str(tmp_path))
    with pytest.raises(ConfigError, match=r"^layout.layers=DT: toy attention .* doesn't support pictures"):
        show(shown)


def test_weights_without_a_place_stop_an_export() -> None:
    model = config("toy").model
    weights = {"decoder.layers.1.self_attention.core_attention.scale": torch.zeros(4)}
    assert unknown_weights(weights, model) == list(weights)
    with pytest.raises(ValueError, match=r"no place for decoder.layers.1.self_attention.core_attention.scale"):
        to_llama(weights, model)


def test_only_static_layers_that_keep_everything_become_dense() -> None:
    layout = LayoutConfig("ETP", kinds={"E": {"kind": "s2", "pattern": {"kind": "dense"}}, "T": {"kind": "toy"}})
    layout.patterns["P"] = {"kind": "sliding_window", "window": 2}
    hybrid = build_hybrid_layout(layout, ScheduleConfig(), num_layers=3, num_heads=4, num_query_groups=2)
    assert hybrid.letters == "DTP"
    assert [type(layer.kind) for layer in hybrid.layers[:2]] == [DenseKind, ToyKind]
    assert hybrid.layers[1].bound == (Dense(),) * 4
    assert not hybrid.layers[1].is_dense
    with pytest.raises(TypeError, match="the data choose"):
        _ = hybrid.layers[1].heads


class CappedKind(StaticKind):
    """Reads every causal key, with a core attention of its own."""

    name = "capped"
    settings_type = DenseSettings
    core_attention = "tests.attention.toy_core:ToyCoreAttention"

    def heads(self) -> HeadsOf:
        return lambda context: (Dense(),) * context.layer.num_heads


def test_a_static_kind_that_computes_otherwise_stays_its_own_where_it_keeps_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(KINDS, "capped", CappedKind)
    cfg = config("capped")
    assert [type(layer.kind) for layer in hybrid_layout(cfg).layers] == [DenseKind, CappedKind] * 2
    assert make_plan(cfg, hybrid_layout(cfg), 1, CPU).letters == "DTDT"
    with pytest.raises(ConfigError, match=r"capped attention \(letter T\) doesn't support recomputation"):
        check(config("capped", "train.recompute=selective"), 1, CPU)
    check(config("capped", "train.recompute=mlp"), 1, CPU)  # repeats no attention


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"features": frozenset({Feature.PICTURES})}, "the data choose what it reads"),
        ({"features": frozenset({Feature.EXPORT})}, "an export holds patterns of softmax attention alone"),
    ],
)
def test_a_kind_can_not_promise_what_would_be_wrong(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(TypeError, match=problem):
        register(type("Promising", (ToyKind,), {"name": "promising", **change}))
    assert "promising" not in KINDS


def test_a_kind_sets_all_class_attributes() -> None:
    with pytest.raises(TypeError, match=r"Nameless: set the class attributes name, settings_type"):
        register(type("Nameless", (DataDependentKind,), {}))


def test_a_kind_can_not_take_the_name_of_another() -> None:
    impostor = type("Impostor", (ToyKind,), {"name": "dense"})
    with pytest.raises(ValueError, match="another kind is named dense"):
        register(impostor)
    assert KINDS["dense"] is DenseKind


@dataclass(frozen=True)
class Case:
    """Settings that can't be, and what the error says."""

    kinds: dict[str, Any]
    telling: str


@pytest.mark.parametrize(
    "case",
    [
        Case({"T": {"kind": "toi"}}, r"layout.kinds.T.kind=toi: unknown. Did you mean toy\?"),
        Case({"T": {"window": 3}}, "layout.kinds.T=.*names no kind"),
        Case({"T": 3}, "layout.kinds.T=3: names no kind"),
        Case({"t": {"kind": "toy"}}, "layout.kinds.t=.*no capital letter"),
        Case({"S": {"kind": "toy"}}, "layout.kinds.S=.*S is the letter of s2"),
        Case({"T": {"kind": "toy", "windows": 3}}, r"layout.kinds.T.windows=3: no setting.*Did you mean window\?"),
        Case({"T": {"kind": "toy", "window": "many"}}, "layout.kinds.T.window=many"),
        Case({"T": {"kind": "toy", "window": 0}}, "layout.kinds.T.window=0: a query reads itself"),
        Case({"T": {"kind": "dense", "window": 0}}, "layout.kinds.T.window=0: no setting of kind dense. It has none"),
        Case({"T": {"kind": "s2", "pattern": {"locl": 3}}}, "layout.kinds.T.pattern.locl=3"),
        Case({"T": {"kind": "s2", "pattern": "sliding_window"}}, "layout.kinds.T.pattern=sliding_window: is no p"),
        Case({"T": {"kind": "s2", "pattern": {"local": 0}}}, "layout.kinds.T.pattern.local=0"),
    ],
)
def test_settings_of_a_kind_that_can_not_be_are_rejected(case: Case) -> None:
    layout = LayoutConfig("DT", kinds=case.kinds)
    with pytest.raises(ConfigError, match=f"^{case.telling}"):
        build_hybrid_layout(layout, ScheduleConfig(), num_layers=2, num_heads=4, num_query_groups=2)


@pytest.mark.parametrize("weight", [".nan", ".inf", "-0.5"])
def test_a_weight_of_an_auxiliary_loss_that_can_not_be_is_rejected(weight: str) -> None:
    with pytest.raises(ConfigError, match=r"^layout.kinds.T.loss_weight=.*auxiliary loss agreement of toy attention"):
        check(config(f"{{kind:toy,loss_weight:{weight.removeprefix('.')}}}"), 1, CPU)
    check(config("{kind:toy,loss_weight:0}"), 1, CPU)


def test_ranks_that_can_not_divide_a_weight_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config("toy", "parallel.tp=2")
    direction, scale = hybrid_layout(cfg).layers[1].kind.weights(attention_shape(cfg.model))
    odd = replace(direction, shape=(5, 3))
    monkeypatch.setattr(ToyKind, "weights", lambda *_: (odd, scale))
    with pytest.raises(
        ConfigError, match=r"^parallel.tp=2: doesn't divide dimension 0, of 5, of toy attention's direction"
    ):
        check(cfg, 2, CPU)
