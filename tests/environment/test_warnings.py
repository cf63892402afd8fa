"""Programs print no warnings that no user can act on."""

import subprocess
import sys

import pytest

WARN = "import s2train, warnings; warnings.warn_explicit('apex is absent', UserWarning, 'file.py', 1, module={!r})"


@pytest.mark.parametrize(
    ("module", "is_printed"),
    [("megatron.core.optimizer", False), ("torch.distributed.checkpoint", False), ("mine", True)],
)
def test_warnings_while_megatron_is_imported_are_left_out(module: str, is_printed: bool) -> None:
    done = subprocess.run([sys.executable, "-c", WARN.format(module)], capture_output=True, text=True, check=True)
    assert ("apex is absent" in done.stderr) == is_printed
