"""Runs launch/needle.py and sends it Ctrl-C while it decodes the second cell.

That is, once `OUTPUT/needle.json` is there.
"""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def plant(table: Path) -> None:
    from s2train.needles import evaluate_checkpoint as checkpoint

    generate = checkpoint.generate

    def planted(*args: Any, **kwargs: Any) -> Any:
        if table.exists():
            os.kill(os.getpid(), signal.SIGINT)
        return generate(*args, **kwargs)

    checkpoint.generate = planted


if __name__ == "__main__":
    (output,) = [argument.removeprefix("output=") for argument in sys.argv if argument.startswith("output=")]
    plant(Path(output) / "needle.json")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
    sys.argv[0] = str(ROOT / "launch" / "needle.py")
    sys.path.insert(0, str(ROOT / "launch"))
    runpy.run_path(sys.argv[0], run_name="__main__")
