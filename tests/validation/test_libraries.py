"""Explicitly selected kernels are used if supported, and rejected with a remedy otherwise."""

from dataclasses import replace
from typing import Any

import pytest
from s2train.kernels import dense_choice
from s2train.kernels.verified import VERIFIED

from s2train.errors import ConfigError
from s2train.planning import check, hybrid_layout, preview
from s2train.validation import libraries
from tests.validation.test_rejections import CPU, GPU, config, rejection

H100 = replace(GPU, capability=(9, 0))
A100 = replace(GPU, capability=(8, 0))


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Both libraries, in the verified releases."""
    releases = {entry.library: entry.release for entry in VERIFIED}
    monkeypatch.setattr(libraries, "fa4_problem", lambda: None)
    monkeypatch.setattr(libraries, "liger_problem", lambda: None)
    monkeypatch.setattr(libraries, "installed_version", releases.get)
    monkeypatch.setattr(dense_choice, "installed_version", releases.get)
    monkeypatch.setattr("s2train.environment.liger.installed_version", releases.get)
    return monkeypatch


def import_all(hardware: Any = H100, **changes: Any) -> None:
    cfg = config(**changes)
    libraries.import_libraries(cfg, hybrid_layout(cfg), hardware)


def rejected_import(**changes: Any) -> ConfigError:
    with pytest.raises(ConfigError) as rejected:
        import_all(**changes)
    return rejected.value


@pytest.mark.parametrize(
    "changes",
    [
        {"dense_attention": "fa4"},
        {"elementwise": "liger", "loss": "linear"},
        {"loss": "liger", "dense_attention": "flash"},
        {"loss": "in_place"},
        {"dense_attention": "flash", "layout__layers": "S", "data__attention_within_documents": True},
        {"dense_attention": "efficient", "model__num_query_groups": 8},
        {"dense_attention": "s2train", "data__attention_within_documents": True, "train__deterministic": True},
    ],
    ids=str,
)
def test_supported_kernels_are_accepted(changes: dict[str, Any]) -> None:
    assert check(config(**changes), 1, H100).fits


WRONG: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "linear loss over tensor parallel ranks": ({"loss": "linear", "parallel__tp": 2}, 2, "loss", "loss=liger"),
    "loss in place over tensor parallel ranks": ({"loss": "in_place", "parallel__tp": 2}, 2, "loss", "loss=liger"),
    "documents in cuDNN": (
        {"dense_attention": "cudnn", "data__attention_within_documents": True}, 1, "dense_attention", "s2train"
    ),
    "documents in FlashAttention-2": (
        {"dense_attention": "flash", "data__attention_within_documents": True}, 1, "dense_attention", "auto"
    ),
    "cuDNN, deterministic": (
        {"dense_attention": "cudnn", "train__deterministic": True}, 1, "dense_attention", "train.deterministic=false"
    ),
    "cuDNN under context parallel": ({"dense_attention": "cudnn", "parallel__cp": 2}, 2, "dense_attention", "auto"),
    "fp32 in FlashAttention-4": (
        {"dense_attention": "fa4", "train__precision": "fp32"}, 1, "dense_attention", "train.precision=bf16"
    ),
    "fp32 in cuDNN": ({"dense_attention": "cudnn", "train__precision": "fp32"}, 1, "dense_attention", "auto"),
    "grouped heads in torch's efficient": ({"dense_attention": "efficient"}, 1, "dense_attention", "auto"),
    "unknown loss": ({"loss": "linaer"}, 1, "loss", "loss=linear"),
    "unknown elementwise": ({"elementwise": "ligher"}, 1, "elementwise", "elementwise=liger"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_kernels_that_do_not_support_the_run_are_rejected_in_plans_too(name: str) -> None:
    changes, processes, setting, remedy = WRONG[name]
    error = rejection(H100, processes, **changes)
    assert error.setting == setting
    assert remedy in error.remedy
    with pytest.raises(ConfigError):
        preview(config(**changes), processes, H100)


@pytest.mark.parametrize(
    ("setting", "value"), [("dense_attention", "fa4"), ("elementwise", "liger"), ("loss", "liger")]
)
def test_a_cpu_has_none_of_them(setting: str, value: str) -> None:
    error = rejection(CPU, **{setting: value})
    assert error.setting == setting
    assert "CUDA" in error.problem


def test_flash_attention_4_is_rejected_on_a_gpu_or_head_that_it_has_no_kernels_for() -> None:
    assert "8.0 is not Hopper's" in rejection(A100, dense_attention="fa4").problem
    assert "head dimension 260" in rejection(H100, dense_attention="fa4", model__head_dim=260).problem


@pytest.mark.parametrize(
    ("setting", "value", "library", "extra"),
    [
        ("dense_attention", "fa4", "flash-attn-4", "s2train[fa4]"),
        ("elementwise", "liger", "liger-kernel", "s2train[liger]"),
        ("loss", "linear", "liger-kernel", "s2train[liger]"),
    ],
)
def test_a_missing_library_is_reported_with_what_to_install(
    setting: str, value: str, library: str, extra: str, installed: pytest.MonkeyPatch
) -> None:
    installed.setattr(libraries, "installed_version", lambda name: None if name == library else "1")
    error = rejection(H100, **{setting: value})
    assert error.setting == setting
    assert f"{library} is not installed" in error.problem
    assert extra in error.remedy


def test_a_loss_in_place_needs_the_release_whose_kernel_it_launches(installed: pytest.MonkeyPatch) -> None:
    installed.setattr(libraries, "installed_version", lambda _: "9.9")
    error = rejection(H100, loss="in_place")
    assert error.setting == "loss"
    assert "9.9 is installed" in error.problem
    assert "set loss=liger" in error.remedy


BROKEN = {
    "fa4_problem": "flash-attn-4 can't be imported (no libcuda)",
    "liger_problem": "liger-kernel can't be imported (another Triton)",
}


@pytest.mark.parametrize(
    ("setting", "value", "function", "remedy"),
    [
        ("dense_attention", "fa4", "fa4_problem", "s2train[fa4]"),
        ("dense_attention", "auto", "fa4_problem", "dense_attention=s2train"),
        ("elementwise", "liger", "liger_problem", "elementwise=torch"),
        ("loss", "linear", "liger_problem", "loss=torch"),
        ("elementwise", "auto", "liger_problem", "elementwise=torch"),
    ],
)
def test_a_broken_library_is_rejected_rather_than_replaced(
    setting: str, value: str, function: str, remedy: str, installed: pytest.MonkeyPatch
) -> None:
    """With `auto` too: another rank, whose import works, would run other kernels."""
    installed.setattr(libraries, function, lambda: BROKEN[function])
    error = rejected_import(**{"model__head_dim": 128, setting: value})
    assert (error.setting, error.value, error.problem) == (setting, value, BROKEN[function])
    assert remedy in error.remedy


def test_a_library_that_the_run_does_not_use_may_be_broken(installed: pytest.MonkeyPatch) -> None:
    for function, problem in BROKEN.items():
        installed.setattr(libraries, function, lambda problem=problem: problem)
    import_all(A100, model__head_dim=128)
    import_all(CPU)
    import_all(dense_attention="s2train", elementwise="torch", loss="torch")


def test_auto_takes_no_library_on_a_cpu() -> None:
    assert check(config(), 1, CPU).fits
