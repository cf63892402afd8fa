"""Runs of `launch/pretrain.py` that only write what a run records."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2train.scaling.launchers import Launch


@dataclass
class FakeRanks:
    """A launcher that trains nothing.

    Attributes:
        records: what every run writes to its metrics.jsonl.
        failing: names of jobs that fail.
        status: how jobs end that print no error; None: they run past their limit.
        started: the jobs that were started, with their number of ranks and settings.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    failing: set[str] = field(default_factory=set)
    status: int | None = 0
    started: list[tuple[str, int, list[str]]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.started]

    def __call__(self, launch: Launch) -> int | None:
        program = launch.program
        run_dir = Path(program[-1].removeprefix("run_dir="))
        self.started.append((run_dir.name, launch.processes, list(program[1:-1])))
        run_dir.mkdir()
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in self.records))
        last = next((word.partition("=")[2] for word in program if word.startswith("train.exit_step=")), "1")
        (run_dir / "checkpoints" / f"iter_{int(last):07d}").mkdir(parents=True)
        launch.log.write_text("OutOfMemoryError: too little\n" if run_dir.name in self.failing else "")
        return 1 if run_dir.name in self.failing else self.status
