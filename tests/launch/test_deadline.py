"""Programs that launch scripts start end with them."""

import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.waited_for import ONCE_WAITED_FOR, note_waits
from tests.program import ROOT


@pytest.mark.parametrize("together", [False, True])
def test_a_printed_command_can_be_pasted_into_a_shell(
    together: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deadline = runpy.run_path(str(ROOT / "launch" / "_deadline.py"))["Deadline"](2)
    program = tmp_path / "a program.py"
    program.write_text("import sys, pathlib; pathlib.Path(__file__ + '.got').write_text(repr(sys.argv[1:]))")
    given = ["run_dir=/tmp/a b", "share=[0.1, 0.3]", "x=$HOME;'"]
    deadline.run_together([[str(program), *given]], 1) if together else deadline.run([str(program), *given])
    printed = capsys.readouterr().out.splitlines()[0].removeprefix("$ ")
    Path(f"{program}.got").unlink()
    subprocess.run(["bash", "-c", printed.replace("python", sys.executable, 1)], check=True)
    assert Path(f"{program}.got").read_text() == repr(given)


@pytest.mark.parametrize("together", [False, True])
def test_sigterm_lets_the_programs_save_and_waits_for_them(
    together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadline = runpy.run_path(str(ROOT / "launch" / "_deadline.py"))["Deadline"](2)
    note_waits(monkeypatch, deadline.run.__globals__)
    program = tmp_path / "program.py"
    program.write_text(
        f"{ONCE_WAITED_FOR}import os, signal, sys, time\n"
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


@pytest.mark.parametrize("together", [False, True])
def test_a_program_that_a_signal_ends_is_reported(together: bool, tmp_path: Path) -> None:
    deadline = runpy.run_path(str(ROOT / "launch" / "_deadline.py"))["Deadline"](2)
    program = tmp_path / "program.py"
    program.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    with pytest.raises(SystemExit, match="SIGKILL ended the program"):
        deadline.run_together([[str(program)]], 1) if together else deadline.run([str(program)])
