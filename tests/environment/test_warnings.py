"""Programs print no warnings that no user can act on."""

import subprocess
import sys

import pytest


def printed(statement: str) -> str:
    """What a statement prints to stderr once s2train is imported."""
    code = f"import s2train, logging, warnings; {statement}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr


@pytest.mark.parametrize(
    ("module", "is_printed"),
    [("megatron.core.optimizer", False), ("torch.distributed.checkpoint", False), ("mine", True)],
)
def test_warnings_while_megatron_is_imported_are_left_out(module: str, is_printed: bool) -> None:
    warn = f"warnings.warn_explicit('apex is absent', UserWarning, 'file.py', 1, module={module!r})"
    assert ("apex is absent" in printed(warn)) == is_printed


@pytest.mark.parametrize(
    ("file", "is_printed"),
    [("site-packages/megatron/core/contexts/kv.py", False), ("s2train/megatron/model.py", True)],
)
def test_megatrons_syntax_that_python_warns_about_is_left_out(file: str, is_printed: bool) -> None:
    """As Python's compiler does, which knows no module."""
    warn = f"warnings.warn_explicit('invalid escape', SyntaxWarning, '/folder/{file}', 1)"
    assert ("invalid escape" in printed(warn)) == is_printed


@pytest.mark.parametrize(
    ("logger", "level", "is_printed"),
    [
        ("megatron.core.models.gpt.gpt_model", "warning", False),
        ("torch.utils.cpp_extension", "warning", False),
        ("megatron.core.models.gpt.gpt_model", "error", True),
        ("s2train.megatron", "warning", True),
    ],
)
def test_of_megatrons_log_errors_alone_are_printed(logger: str, level: str, is_printed: bool) -> None:
    assert ("GPTModel" in printed(f"logging.getLogger({logger!r}).{level}('GPTModel')")) == is_printed
