"""transformer-engine and FP8 are used if supported, and rejected with a remedy otherwise."""

from dataclasses import replace
from typing import Any

import pytest

from s2train.planning import check
from s2train.validation import transformer_engine as backend
from tests.validation.test_rejections import CPU, GPU, config, rejection

H100 = replace(GPU, capability=(9, 0))
WITH_FP8 = {"layer_backend": "te", "fp8": "hybrid"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "te_problem", lambda: None)


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "te_problem", lambda: "transformer-engine is not installed")


@pytest.mark.usefixtures("missing")
def test_a_missing_transformer_engine_is_reported_with_what_to_install() -> None:
    error = rejection(H100, layer_backend="te")
    assert error.setting == "layer_backend"
    assert "transformer-engine[pytorch]" in error.remedy
    assert "layer_backend=local" in error.remedy
    assert rejection(H100, fp8="hybrid").setting == "fp8"  # layer_backend=auto finds none either
    assert check(config(), 1, H100).fits


@pytest.mark.usefixtures("installed")
def test_a_cpu_has_no_transformer_engine() -> None:
    assert "layer_backend=local" in rejection(CPU, layer_backend="te").remedy
    assert "fp8=none" in rejection(CPU, fp8="hybrid").remedy


@pytest.mark.usefixtures("installed")
def test_fp8_is_accepted_if_transformer_engine_and_the_gpu_support_it() -> None:
    assert check(config(**WITH_FP8), 1, H100).fits
    assert check(config(fp8="e4m3"), 1, H100).fits


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("changes", "capability", "setting", "remedy"),
    [
        ({}, (8, 0), "fp8", "fp8=none"),
        ({"fp8_recipe": "blockwise"}, (8, 9), "fp8_recipe", "fp8_recipe=tensorwise"),
        ({"fp8_recipe": "mxfp8"}, (9, 0), "fp8_recipe", "fp8_recipe=tensorwise"),
        ({"layer_backend": "local"}, (9, 0), "fp8", "layer_backend=te"),
        ({"train__precision": "fp32"}, (9, 0), "fp8", "train.precision=bf16"),
        ({"model__ffn_hidden_size": 776}, (9, 0), "fp8", "model.ffn_hidden_size"),
        ({"train__seq_length": 4100}, (9, 0), "fp8", "train.seq_length"),
        ({"fp8": "hybird"}, (9, 0), "fp8", "fp8=hybrid"),
        ({"fp8_recipe": "delayed"}, (9, 0), "fp8_recipe", "tensorwise"),
    ],
)
def test_unsupported_fp8_is_rejected(
    changes: dict[str, Any], capability: tuple[int, int], setting: str, remedy: str
) -> None:
    error = rejection(replace(GPU, capability=capability), **{**WITH_FP8, **changes})
    assert error.setting == setting
    assert remedy in error.remedy


def test_fp8_is_accepted_on_a_device_of_unknown_capability(installed: None) -> None:
    assert check(config(**WITH_FP8), 1, GPU).fits


@pytest.mark.usefixtures("installed")
def test_blockwise_fp8_needs_a_newer_cuda_than_tensorwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", "12.8")
    assert check(config(**WITH_FP8), 1, H100).fits
    assert "fp8_recipe=tensorwise" in rejection(H100, **WITH_FP8, fp8_recipe="blockwise").remedy
    monkeypatch.setattr("torch.version.cuda", "13.0")
    assert check(config(**WITH_FP8, fp8_recipe="blockwise"), 1, H100).fits
