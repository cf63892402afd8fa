"""What every kind of attention must hold to, and a toy kind that lives here: see CONTRIBUTING.md.

A new kind brings a case and its definition in `tests/attention/oracles.py`; the rest runs over it as it is.
"""

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from s2train.kernels.relative_error import relative_error

from s2train.attention.features import Feature
from s2train.attention.kind import AttentionKind
from s2train.attention.registry import KINDS, kinds_of, register
from s2train.checkpoints.folders import write_config
from s2train.checkpoints.hugging_face.config import ExportConfig
from s2train.checkpoints.hugging_face.exporting import export
from s2train.config import LayoutConfig, PretrainConfig
from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.needles.config import NeedleConfig
from s2train.needles.request import read_request
from s2train.planning import compose_run, hybrid_layout
from s2train.planning.config import ShowLayoutConfig
from s2train.planning.show import show
from s2train.validation.attention_kinds import check_kinds
from tests.attention.oracles import ORACLES
from tests.attention.toy import ToyKind
from tests.checkpoints.hugging_face.test_export import load_file, megatron_logits, tokens_of
from tests.program import SMALL, UNSAVED, Outcome, error_line, metrics, pretrain, results_of, run

STEPS = 3  # two with the block selection dense, and one with it sparse
TOLERANCE = 1e-5  # of another division, in fp32
names = pytest.mark.parametrize("name", ORACLES)


@pytest.fixture(autouse=True)
def toy() -> Iterator[None]:
    register(ToyKind)
    yield
    del KINDS["toy"]


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    found: dict[str, Any] = results_of("tests.attention.conformance_program")
    return found


def test_every_kind_has_a_case() -> None:
    assert KINDS.keys() == {oracle.kind for oracle in ORACLES.values()}


@names
def test_outputs_and_all_gradients_equal_the_oracles(measured: dict[str, Any], name: str) -> None:
    parity = measured[name]["parity"]
    for found, torch_error in zip(parity["found"], parity["torch"], strict=True):
        assert found <= 2 * torch_error


@names
def test_auxiliary_losses_are_recorded_as_the_oracle_has_them(measured: dict[str, Any], name: str) -> None:
    parity = measured[name]["parity"]
    assert parity["recorded"] == pytest.approx(parity["losses"], rel=1e-5)
    assert len(parity["losses"]) == sum(weight is not None for weight in kind_of(name).columns().values())


@names
def test_no_output_depends_on_a_later_token(measured: dict[str, Any], name: str) -> None:
    assert all(measured[name]["future"]["kept"])
    assert all(measured[name]["future"]["changed"])


@names
def test_the_plan_counts_parameters_and_flops_of_the_built_model(measured: dict[str, Any], name: str) -> None:
    counts = measured[name]["counts"]
    assert counts["parameters"][0] == counts["parameters"][1]
    found, planned = counts["kept"]
    assert found == (planned if counts["exact"] else pytest.approx(planned, rel=0.05))
    assert counts["attention_flops"][0] == pytest.approx(counts["attention_flops"][1])
    assert counts["extra"][0] == counts["extra"][1]
    assert counts["extra"][1] or not counts["own"]


@names
def test_recomputation_gives_the_same_losses_and_gradients_and_records_each_value_once(
    measured: dict[str, Any], name: str
) -> None:
    found = measured[name]["recomputation"]
    if Feature.RECOMPUTATION not in kind_of(name).features:
        assert found is None
        return
    assert all(found["equal"])
    assert all(found["records"])
    assert found["missing"] == 0
    assert set(found["per_layer"]) <= {1}


@names
def test_packed_documents_are_those_of_the_oracle_one_by_one(measured: dict[str, Any], name: str) -> None:
    errors = measured[name]["documents"]
    if Feature.PACKED_DOCUMENTS not in kind_of(name).features:
        assert errors is None
        return
    for found, torch_error in zip(errors["found"], errors["torch"], strict=True):
        assert found <= 2 * torch_error


@names
def test_decoding_equals_the_uncached_pass_or_is_rejected(measured: dict[str, Any], name: str) -> None:
    found = measured[name]["decoding"]
    if Feature.DECODING in kind_of(name).features:
        assert found["error"] < 2e-6
    else:
        assert "doesn't support decoding" in found["rejected"]


@names
def test_a_picture_is_drawn_of_a_kind_that_promises_it(name: str, tmp_path: Path) -> None:
    if Feature.PICTURES not in kind_of(name).features:
        with pytest.raises(ConfigError, match="doesn't support pictures"):
            show_layout(name, tmp_path / "picture")
        assert not (tmp_path / "picture").exists()
        return
    show_layout(name, tmp_path / "picture")
    assert imread(tmp_path / "picture" / "layout.png").std() > 0.1


def show_layout(name: str, folder: Path) -> None:
    cfg = config_of(name)
    show(ShowLayoutConfig(**{field.name: getattr(cfg, field.name) for field in fields(cfg)}, output=str(folder)))


@pytest.mark.slow
def test_an_export_gives_the_logits_of_a_model_of_all_kinds_that_promise_it(tmp_path: Path) -> None:
    cases = [oracle for name, oracle in ORACLES.items() if Feature.EXPORT in kind_of(name).features]
    layers = "".join(oracle.layers for oracle in cases)
    settings = [f"model.num_layers={len(layers)}", f"layout.layers={layers}", "model.init_std=0.2"]
    pretrain(tmp_path / "run", *settings, "train.steps=1", "optim.warmup_steps=0", "train.precision=fp32").succeeded()
    run("export.py", f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'out'}", processes=0).succeeded()
    load, tokens = load_file(tmp_path / "out" / "modeling_s2.py").S2ForCausalLM.from_folder, tokens_of()
    with torch.no_grad():
        single, exact = (
            model(torch.from_numpy(tokens)).logits
            for model in (load(str(tmp_path / "out")), load(str(tmp_path / "out")).double())
        )
    error = relative_error(megatron_logits(tmp_path / "run", tokens, tmp_path), exact)
    assert error < 2 * relative_error(single, exact)


# What asks for a feature in a run. Decoding, exports and pictures are asked for by other programs.
ASKED = {
    Feature.TENSOR_PARALLEL: ["parallel.tp=2"],
    Feature.SHARED_KV_HEADS: ["parallel.tp=4"],
    Feature.SEQUENCE_PARALLEL: ["parallel.tp=2", "parallel.sequence_parallel=true"],
    Feature.PIPELINE_PARALLEL: ["parallel.pp=2"],
    Feature.CONTEXT_PARALLEL: ["parallel.cp=2"],
    Feature.PACKED_DOCUMENTS: ["data.attention_within_documents=true"],
    Feature.RECOMPUTATION: ["train.recompute=selective"],
    Feature.TRANSFORMER_ENGINE: ["layer_backend=te"],
    Feature.FP8: ["layer_backend=te", "fp8=hybrid"],
    Feature.DETERMINISTIC: ["train.deterministic=true"],
}
NEEDED = {
    Feature.SHARED_KV_HEADS: Feature.TENSOR_PARALLEL,
    Feature.SEQUENCE_PARALLEL: Feature.TENSOR_PARALLEL,
    Feature.FP8: Feature.TRANSFORMER_ENGINE,
}
GPU = Hardware("NVIDIA H100 80GB HBM3", "cuda", 80 << 30, None, (9, 0))


@names
def test_a_run_may_ask_for_what_a_kind_promises_and_nothing_else(name: str) -> None:
    kind = kind_of(name)
    for feature, settings in ASKED.items():
        cfg, needed = config_of(name, *settings), NEEDED.get(feature, feature)
        if feature in kind.features:
            assert needed in kind.features
            check_kinds(cfg, hybrid_layout(cfg), GPU)
            continue
        with pytest.raises(ConfigError) as raised:
            check_kinds(cfg, hybrid_layout(cfg), GPU)
        assert_names(raised.value, kind, {feature, needed} - kind.features)


def assert_names(error: ConfigError, kind: AttentionKind, lacking: set[Feature]) -> None:
    """One line names the kind, its letter and a feature that it lacks."""
    words = f"{kind.label} attention (letter {kind.letter}) doesn't support "
    assert error.problem in {words + feature.value for feature in lacking}
    assert error.remedy
    assert "\n" not in str(error)


@pytest.mark.parametrize("feature", [Feature.EXPORT, Feature.DECODING])
def test_programs_reject_what_a_kind_does_not_promise_before_they_read_weights(
    feature: Feature, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ToyKind, "features", ToyKind.features - {feature})
    for name in [name for name in ORACLES if feature not in kind_of(name).features]:
        checkpoint = tmp_path / name / "checkpoints" / "iter_0000001"
        checkpoint.mkdir(parents=True)
        write_config(config_of(name), checkpoint / "config.yaml")  # nothing else is there to read
        with pytest.raises(ConfigError) as raised:
            start(feature, checkpoint, tmp_path / name / "out")
        assert_names(raised.value, kind_of(name), {feature})
        assert [path.name for path in (tmp_path / name).iterdir()] == ["checkpoints"]


def start(feature: Feature, checkpoint: Path, output: Path) -> None:
    if feature is Feature.EXPORT:
        export(ExportConfig(str(checkpoint), str(output)))
    else:
        read_request(NeedleConfig(str(checkpoint)), 1, GPU)


def test_a_kind_that_does_not_decode_is_rejected(measured: dict[str, Any]) -> None:
    assert "shy attention (letter T) doesn't support decoding" in measured["shy"]["decoding"]["rejected"]


# One model with a layer of every kind, and two of the toy's.
# The auxiliary loss weighs so much that its gradient is most of the gradient's norm.
LAYERS = [
    "model.num_layers=6",
    "layout.layers=DSTTEH",
    "+layout.kinds.E={kind:block_selection,scorer:sea,top_k:2,warm_up_steps:2,loss_weight:100,mix_mean:true}",
    "+layout.kinds.H={kind:hyper,bucket:16,samples:8,projections:6,shortest:32,window:16,sinks:16}",
]
MIXED = [
    *LAYERS,
    "+layout.kinds.T={kind:toy,window:5,loss_weight:20000}",
    f"train.steps={STEPS}",
    "checkpoint.interval=2",
    "optim.warmup_steps=1",
]


def train(run_dir: Path, *arguments: str, processes: int = 1) -> Outcome:
    settings = [*SMALL, f"run_dir={run_dir}", *MIXED, *arguments]
    return run("tests.attention.toy_program", "pretrain.py", *settings, processes=processes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    folder = tmp_path_factory.mktemp("trained")
    outcome = train(folder).succeeded()
    return folder, outcome


def values(run_dir: Path) -> list[dict[str, Any]]:
    names = ("step", "loss", "grad_norm", "toy_agreement", "toy_agreement_by_layer", "toy_kept_share")
    names += tuple(f"block_selection_{name}" for name in ("kl", "mse", "recall"))
    return [{name: record[name] for name in names} for record in metrics(run_dir)]


def test_auxiliary_losses_have_columns_of_their_own(trained: tuple[Path, Outcome]) -> None:
    folder, outcome = trained
    for record in values(folder):
        by_layer = record["toy_agreement_by_layer"]
        assert list(by_layer) == ["2", "3"]
        assert record["toy_agreement"] == pytest.approx(sum(by_layer.values()) / 2)
        assert 0.3 < record["toy_kept_share"] < 0.8
    last = metrics(folder)[-1]
    line = [line for line in outcome.out.splitlines() if line.startswith(f"step {last['step']}/")][-1]
    logged = dict(part.split(" ")[:2] for part in line.split(" | ") if part.startswith("toy_"))
    assert {name: float(value) for name, value in logged.items()} == {
        name: pytest.approx(last[name], rel=0.05) for name in ("toy_agreement", "toy_kept_share")
    }
    assert list(last["block_selection_recall_by_layer"]) == ["4"]


def test_weights_of_the_kind_learn_from_the_auxiliary_loss(trained: tuple[Path, Outcome], tmp_path: Path) -> None:
    train(tmp_path, UNSAVED, "layout.kinds.T.loss_weight=0").succeeded()
    with_loss, without = values(trained[0]), values(tmp_path)
    assert with_loss[0]["loss"] == without[0]["loss"]
    assert with_loss[0]["grad_norm"] > 2 * without[0]["grad_norm"]


def test_a_resumed_run_has_the_same_bits(trained: tuple[Path, Outcome], tmp_path: Path) -> None:
    start = trained[0] / "checkpoints" / "iter_0000002"
    train(tmp_path, UNSAVED, f"checkpoint.resume={start}").succeeded()
    assert values(tmp_path) == values(trained[0])[2:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "division",
    [
        ["parallel.tp=2", "parallel.sequence_parallel=true"],
        ["parallel.pp=2"],
        [],
    ],
    ids=["tensor and sequence parallel", "pipeline parallel", "data parallel"],
)
def test_another_division_trains_alike(trained: tuple[Path, Outcome], division: list[str], tmp_path: Path) -> None:
    train(tmp_path, UNSAVED, *division, processes=2).succeeded()
    for found, expected in zip(values(tmp_path), values(trained[0]), strict=True):
        by_layer = expected.pop("toy_agreement_by_layer")
        assert found.pop("toy_agreement_by_layer") == pytest.approx(by_layer, rel=TOLERANCE)
        # a KL divergence near 0 is a difference of logarithms in fp32
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=1e-8)


def test_settings_that_weights_do_not_depend_on_may_change_with_consent(trained: tuple[Path, Outcome]) -> None:
    loss_weight, window = "+layout.kinds.T={kind:toy,window:5,loss_weight:1}", "+layout.kinds.T={kind:toy,window:6}"
    more = [*LAYERS, f"train.steps={STEPS + 1}", f"optim.decay_steps={STEPS}", "checkpoint.interval=2"]
    settings = [*SMALL, f"run_dir={trained[0]}", *more, "optim.warmup_steps=1"]
    rejected = run("tests.attention.toy_program", "pretrain.py", *settings, loss_weight, processes=1)
    assert "layout.kinds.T.loss_weight=1.0" in error_line(rejected)
    assert "checkpoint.allow_changes=true" in error_line(rejected)
    consent = "checkpoint.allow_changes=true"
    rejected = run("tests.attention.toy_program", "pretrain.py", *settings, consent, window, processes=1)
    assert "layout.kinds.T.window=6" in error_line(rejected)
    assert "was trained with layout.kinds.T.window=5" in error_line(rejected)


@pytest.mark.slow
def test_weights_alone_of_a_dense_model_start_a_model_of_another_kind(tmp_path: Path) -> None:
    settings = ["model.num_layers=6", "layout.layers=D", "train.steps=3", "checkpoint.interval=1"]
    pretrain(tmp_path / "dense", *settings).succeeded()
    start = tmp_path / "dense/checkpoints/iter_0000003"
    progress = json.loads((start / "progress.json").read_text())
    (start / "progress.json").write_text(json.dumps(progress | {"weights_only": True}))
    train(tmp_path / "mixed", UNSAVED, f"checkpoint.resume={start}").succeeded()
    assert values(tmp_path / "mixed")[0]["toy_agreement"] > 0
    assert metrics(tmp_path / "mixed")[0]["loss"] < metrics(tmp_path / "dense")[0]["loss"] - 0.05


def test_export_of_a_kind_that_does_not_support_it_is_rejected(trained: tuple[Path, Outcome], tmp_path: Path) -> None:
    arguments = [f"checkpoint={trained[0]}", f"output={tmp_path / 'out'}"]
    outcome = run("tests.attention.toy_program", "export.py", *arguments, processes=0)
    assert "toy attention (letter T) doesn't support export" in error_line(outcome)
    assert not (tmp_path / "out").exists()


def layout_of(name: str) -> LayoutConfig:
    oracle = ORACLES[name]
    return LayoutConfig(oracle.layers, kinds=oracle.kinds)


def kind_of(name: str) -> AttentionKind:
    return kinds_of(layout_of(name))[ORACLES[name].layers]


def config_of(name: str, *settings: str) -> PretrainConfig:
    return replace(composed(*settings), layout=layout_of(name))


@cache
def composed(*settings: str) -> PretrainConfig:
    return compose_run(["+model=tiny_hybrid", "layer_backend=local", *settings])
