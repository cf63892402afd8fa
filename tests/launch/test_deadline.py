"""Programs that launch scripts start end with them."""

import runpy
import signal
from pathlib import Path

import pytest

from tests.program import ROOT


@pytest.mark.parametrize("together", [False, True])
def test_sigterm_lets_the_programs_save_and_waits_for_them(together: bool, tmp_path: Path) -> None:
    deadline = runpy.run_path(str(ROOT / "launch" / "_deadline.py"))["Deadline"](2)
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, sys, time\n"
        "def save(*_): time.sleep(0.3); open(__file__ + '.saved', 'w'); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"  # as scancel's signal to the script alone
        "time.sleep(60)\n"
    )
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        deadline.run_together([[str(program)]], 1) if together else deadline.run([str(program)])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert Path(f"{program}.saved").exists()
    assert signal.getsignal(signal.SIGTERM) is before
