"""Prepare Triton's compiler while a program does something else."""

from __future__ import annotations

import threading
from contextlib import suppress


def prepare_compiler(capability: tuple[int, int]) -> threading.Thread:
    """Identify Triton's compiler and ptxas in a thread.

    A process's first kernel waits half a second for that, even if its binary is read from the cache: its name there has
    a hash of the compiler, a file of 400 MB. Other threads can run meanwhile. If it fails, the first kernel fails too,
    and reports the reason.

    Args:
        capability: the GPU's compute capability.
    """
    # not in the thread, where they would wait for other imports, and others for them
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.cache import triton_key

    def identify() -> None:
        with suppress(OSError, RuntimeError):
            triton_key()
            make_backend(GPUTarget("cuda", 10 * capability[0] + capability[1], 32)).hash()

    thread = threading.Thread(target=identify, name="Triton's compiler", daemon=True)
    thread.start()
    return thread
