"""Tasks that fail, hang or kill their process cost only themselves."""

from pathlib import Path

from s2train.kernels import workers
from s2train.kernels.workers import run_tasks

# The module alone: its package imports torch, which takes longer than the test.
WORKER = f"""
import os, sys, time
sys.path.append({str(Path(workers.__file__).parent)!r})
from workers import serve
def handle(task):
    if task["do"] == "die":
        os._exit(7)
    if task["do"] == "hang":
        time.sleep(600)
    if task["do"] == "raise":
        raise ValueError("broken")
    print("noise")
    return {{"ok": True, "pid": os.getpid()}}
serve(handle)
"""


def rows(*todo: str, seconds: float = 60) -> list[dict[str, object]]:
    return list(run_tasks(["-c", WORKER], [{"do": x} for x in todo], 1, seconds))


def test_others_go_on_in_a_new_process() -> None:
    first, died, second, failed, third, fourth = rows("work", "die", "work", "raise", "work", "work")
    assert all(row["ok"] for row in (first, second, third, fourth))
    assert died["ok"] is False
    assert "exit status 7" in str(died["error"])
    assert "ValueError: broken" in str(failed["error"])
    assert len({first["pid"], second["pid"], third["pid"]}) == 3
    assert third["pid"] == fourth["pid"]


def test_a_task_that_hangs_is_given_up() -> None:
    (row,) = rows("hang", seconds=2)
    assert row == {"ok": False, "error": "no result after 2 s"}
