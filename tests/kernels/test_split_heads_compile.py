"""The kernel that splits and rotates heads compiles for Hopper without a GPU, and spills nothing.

In a separate process: Triton compiles only where it does not interpret.
"""

import json
import re
import sys

import pytest
import torch
import triton

from tests.kernels.hopper_target import Driver, ptxas_log
from tests.program import reported


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_compiles_for_hopper(backward: bool) -> None:
    assert reported(__name__, (backward,))["spilled_bytes"] == 0


def report(backward: bool) -> dict[str, int]:
    from s2train.kernels import split_heads

    triton.runtime.driver.set_active(Driver())
    packed, cos = torch.empty(8, 2, 2, 6 * 64, dtype=torch.bfloat16), torch.empty(16, 32)
    q, k, v = (torch.empty(8, 2, heads, 64, dtype=torch.bfloat16) for heads in (8, 2, 2))
    compiled = []
    launcher = split_heads._launch_kernel
    kernel = launcher.kernel

    class Compiling:
        def __getitem__(self, grid: tuple[int]) -> object:
            return lambda *args, **kwargs: compiled.append(kernel.run(*args, **kwargs, grid=grid, warmup=True))

    launcher.kernel = Compiling()
    split_heads._launch(packed, q, k, v, cos, cos, backward)
    log = ptxas_log(compiled[0])
    return {"spilled_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))}


if __name__ == "__main__":
    print(json.dumps(report(*json.loads(sys.argv[1]))))
