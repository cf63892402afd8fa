"""Kernels fuse multiplications with additions, whatever Triton's default.

`test_configs.py` compiles some where it is another.
"""

import ast
from pathlib import Path

import pytest
import s2train.kernels
from s2train.kernels.scale_rows import _scale_rows_kernel

SOURCES = sorted(Path(s2train.kernels.__file__).parent.rglob("*.py"))


def test_a_launch_asks_for_it_and_can_ask_for_the_contrary(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(
        type(_scale_rows_kernel), "run", lambda *_, enable_fp_fusion, **__: asked.append(enable_fp_fusion)
    )
    _scale_rows_kernel[(1,)]()
    _scale_rows_kernel[(1,)](enable_fp_fusion=False)
    assert asked == [True, False]


def test_every_kernel_that_is_launched_asks_for_it() -> None:
    found = {
        function.name: [ast.unparse(one) for one in function.decorator_list]
        for path in SOURCES
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
    }
    kernels = {
        name: decorators
        for name, decorators in found.items()
        if (name.startswith("s2_") or name.endswith("_kernel")) and any(".jit" in one for one in decorators)
    }
    assert len(kernels) > 30
    assert [name for name, decorators in kernels.items() if decorators[0] != "with_fp_fusion"] == []
