"""Run GPU tasks in worker processes that are replaced when one fails.

A worker fails when a task raises, hangs or breaks the CUDA context.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

Row = dict[str, Any]
_MARK = "RESULT "


def serve(handle: Callable[[Row], Row]) -> None:
    """Answer tasks from standard input until it closes (worker side)."""
    for line in sys.stdin:
        try:
            row = handle(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            text = " ".join(f"{type(error).__name__}: {error}".split())
            row = {"ok": False, "error": text[:300]}
        print(_MARK + json.dumps(row), flush=True)


def run_tasks(command: list[str], tasks: list[Row], jobs: int, seconds: float) -> Iterator[Row]:
    """Yield results in task order, each as early as possible.

    `command` holds Python's arguments for a worker. A task without an answer after `seconds`, or whose worker died,
    yields {"ok": False, "error": why}; the remaining tasks continue in a new worker.
    """
    idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
    for _ in range(jobs):
        idle.put(None)

    def run(task: Row) -> Row:
        worker = idle.get() or _Worker(command)
        row = worker.ask(task, seconds)
        if "error" in row:
            worker.stop()
            idle.put(None)
        else:
            idle.put(worker)
        return row

    with ThreadPoolExecutor(jobs) as pool:
        futures: list[Future[Row]] = [pool.submit(run, task) for task in tasks]
        for future in futures:
            yield future.result()
    while not idle.empty():
        worker = idle.get()
        if worker is not None:
            worker.stop()


class _Worker:
    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.error_lines: deque[str] = deque(maxlen=20)
        self.threads = [
            threading.Thread(target=self._read, args=(self.process.stdout, self._answer), daemon=True),
            threading.Thread(target=self._read, args=(self.process.stderr, self._keep_line), daemon=True),
        ]
        for thread in self.threads:
            thread.start()

    def ask(self, task: Row, seconds: float) -> Row:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
            answer = self.answers.get(timeout=seconds)
        except queue.Empty:
            return {"ok": False, "error": f"no result after {seconds:.0f} s"}
        except OSError:
            answer = None
        if answer is None:
            status = self.process.wait()
            self.threads[1].join(2)
            last = next((x.strip() for x in reversed(self.error_lines) if x.strip()), "no output")
            return {"ok": False, "error": f"exit status {status}: {last}"[:300]}
        row: Row = json.loads(answer)
        return row

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def _answer(self, line: str | None) -> None:
        if line is None:
            self.answers.put(None)
        elif line.startswith(_MARK):
            self.answers.put(line.removeprefix(_MARK))

    def _keep_line(self, line: str | None) -> None:
        if line is not None:
            self.error_lines.append(line)

    @staticmethod
    def _read(stream: IO[str], put: Callable[[str | None], None]) -> None:
        for line in stream:
            put(line)
        put(None)
