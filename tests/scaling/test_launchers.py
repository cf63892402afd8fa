"""Ranks are forks of one process, and end as those of torchrun do."""

import os
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from threading import Timer

import pytest

from s2train.scaling.launchers import Launch, Launcher, by_fork, by_torchrun
from tests.processes import is_alive, wait_for
from tests.program import ROOT

SLEEP = "import os, sys, time\nopen(f\"{sys.argv[1]}/{os.environ['RANK']}\", 'w').write(str(os.getpid()))\n"


ENOUGH_S = 400  # that no rank needs here, even on a busy machine


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Ranks are forks of a process that has imported torch, as the program's have; else each would."""
    get_context("forkserver").set_forkserver_preload(["s2train.scaling.launchers"])


def program(folder: Path, text: str) -> list[str]:
    path = folder / "program.py"
    path.write_text(text)
    return [str(path), str(folder)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("[0-9]") if path.read_text()]


def test_what_forks_have_imported_asks_no_driver() -> None:
    """Else no fork could use a GPU."""
    text = (
        "import importlib, torch\n"
        "from s2train.megatron import lazy_imports\n"
        "def fail(): raise SystemExit('the driver was asked')\n"
        "torch.cuda.is_available = fail\n"
        "lazy_imports.import_megatron = lambda: torch.cuda.is_available()  # as megatron-core 0.19's modules do\n"
        "importlib.import_module = lambda name: None\n"
        "import s2train.scaling.preload\n"
    )
    done = subprocess.run([sys.executable, "-c", text], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_ranks_know_their_place_arguments_environment_and_log(tmp_path: Path) -> None:
    text = (
        "import os, sys, multiprocessing\n"
        "places = [os.environ[n] for n in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'GIVEN')]\n"
        "port = int(os.environ['MASTER_PORT'])\n"
        "print(__name__, *sys.argv[1:], *places, multiprocessing.get_start_method(), port > 0, flush=True)\n"
    )
    status = by_fork(Launch(program(tmp_path, text), 2, environment(GIVEN="value"), tmp_path / "log", ENOUGH_S))
    method = "fork" if sys.version_info < (3, 14) else "forkserver"
    expected = [f"__main__ {tmp_path} {rank} {rank} 2 2 value {method} True" for rank in (0, 1)]
    assert (status, sorted((tmp_path / "log").read_text().splitlines())) == (0, expected)


def test_the_port_is_held_before_ranks_start_and_they_meet_there(tmp_path: Path) -> None:
    text = (
        "import os, socket, torch\n"
        "socket.create_connection((os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']))).close()\n"
        "torch.distributed.init_process_group('gloo')\n"
        "total = torch.ones(1)\n"
        "torch.distributed.all_reduce(total)\n"
        "assert total.item() == 2\n"
    )
    assert by_fork(Launch(program(tmp_path, text), 2, environment(), tmp_path / "log", ENOUGH_S)) == 0


def test_a_module_runs_too(tmp_path: Path) -> None:
    (tmp_path / "some_module.py").write_text("import sys\nprint(__name__, *sys.argv[1:])\n")
    place = environment(PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]))
    assert by_fork(Launch(["-m", "some_module", "a", "b"], 1, place, tmp_path / "log", ENOUGH_S)) == 0
    assert (tmp_path / "log").read_text() == "__main__ a b\n"


@pytest.mark.parametrize(("ending", "status"), [("sys.exit(3)", 3), ("raise ValueError('wrong')", 1)])
def test_the_first_rank_that_fails_ends_the_others(tmp_path: Path, ending: str, status: int) -> None:
    text = f"{SLEEP}if os.environ['RANK'] == '1':\n    {ending}\ntime.sleep(600)\n"
    assert by_fork(Launch(program(tmp_path, text), 3, environment(), tmp_path / "log", ENOUGH_S)) == status
    assert not any(map(is_alive, pids(tmp_path)))
    assert ("ValueError: wrong" in (tmp_path / "log").read_text()) == (status == 1)


def test_ranks_end_when_time_is_up(tmp_path: Path) -> None:
    words = program(tmp_path, f"{SLEEP}time.sleep(600)\n")
    assert by_fork(Launch(words, 2, environment(), tmp_path / "log", 3)) is None
    assert not any(map(is_alive, pids(tmp_path)))


@pytest.mark.parametrize("launch", [by_fork, by_torchrun])
def test_ranks_end_when_the_command_is_interrupted(launch: Launcher, tmp_path: Path) -> None:
    words = program(tmp_path, "import time\ntime.sleep(600)\n")
    given = Launch(words, 1, environment(), tmp_path / "log", ENOUGH_S)
    Timer(1.0, given.stopped.set).start()
    began = time.monotonic()
    assert launch(given) is None
    assert time.monotonic() - began < ENOUGH_S


def test_ranks_end_with_the_program_that_started_them(tmp_path: Path) -> None:
    words = program(tmp_path, f"{SLEEP}time.sleep(600)\n")
    caller = tmp_path / "caller.py"
    caller.write_text(
        "import multiprocessing, os\nfrom pathlib import Path\n"
        "from s2train.scaling.launchers import Launch, by_fork\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_forkserver_preload(['s2train.scaling.launchers'])\n"
        f"    by_fork(Launch({words}, 2, dict(os.environ), Path({str(tmp_path / 'log')!r}), {ENOUGH_S}))\n"
    )
    started = subprocess.Popen([sys.executable, str(caller)], env=environment())
    try:
        wait_for(lambda: len(pids(tmp_path)) == 2, "the ranks")
    finally:
        started.kill()
        started.wait()
    wait_for(lambda: not any(map(is_alive, pids(tmp_path))), "the end of the ranks")


def test_torchrun_keeps_the_users_log_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch" / "distributed").mkdir(parents=True)
    for path in (tmp_path / "torch/__init__.py", tmp_path / "torch/distributed/__init__.py"):
        path.touch()
    show = "import os, sys\nprint(os.environ['PET_LOG_DIR'], '--log-dir' in sys.argv)\n"
    (tmp_path / "torch/distributed/run.py").write_text(show)
    monkeypatch.setenv("PET_LOG_DIR", "mine")
    place = environment(PYTHONPATH=str(tmp_path))
    assert by_torchrun(Launch(["program.py"], 1, place, tmp_path / "log", ENOUGH_S)) == 0
    assert (tmp_path / "log").read_text() == "mine False\n"
