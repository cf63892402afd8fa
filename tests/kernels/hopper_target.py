"""Compiles Triton kernels for Hopper without a GPU."""

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.nvidia.compiler import get_ptxas

SHARED_BYTES = 232448  # of a program on compute capability 9.0


@dataclass(frozen=True)
class Driver:
    """Stands in for Triton's: a GPU of a compute capability, by default Hopper's, that nothing is launched on."""

    capability: int = 90

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def ptxas_log(kernel: Any) -> str:
    """Assemble a compiled kernel's PTX; return what ptxas says of registers and spills."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(kernel.asm["ptx"])
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(ptx), "-o", str(ptx) + ".o"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
