"""Triton's compiler is identified before the first kernel needs that."""

import pytest
from s2train.kernels.compiler import prepare_compiler
from triton.backends.nvidia import compiler
from triton.runtime import cache


def test_the_first_kernel_finds_compiler_and_ptxas_identified() -> None:
    cache.triton_key.cache_clear()
    compiler.get_ptxas_version.cache_clear()
    prepare_compiler((9, 0)).join()
    assert cache.triton_key()
    assert compiler.get_ptxas_version(90)
    assert cache.triton_key.cache_info().misses == 1
    assert compiler.get_ptxas_version.cache_info().misses == 1


def test_a_failure_is_left_to_the_first_kernel(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> str:
        raise FileNotFoundError("libtriton.so")

    monkeypatch.setattr(cache, "triton_key", fail)
    prepare_compiler((9, 0)).join()
    assert capfd.readouterr().err == ""
