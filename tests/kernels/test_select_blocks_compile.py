"""The kernel that selects blocks compiles for Hopper without a GPU, and spills nothing.

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


@pytest.mark.parametrize("case", [(1024, True), (8192, False)], ids=str)
def test_compiles_for_hopper(case: tuple[int, bool]) -> None:
    assert reported(__name__, case)["spilled_bytes"] == 0


def report(columns: int, normalize: bool) -> dict[str, object]:
    from s2train.kernels.select_blocks_kernel import num_warps, s2_select_blocks_kernel

    triton.runtime.driver.set_active(Driver())
    scores, numbers = torch.empty(64), torch.empty(64, dtype=torch.int32)
    warps = num_warps(columns)
    compiled = s2_select_blocks_kernel.run(
        scores, numbers.long(), numbers, numbers, 4 * 8 * columns**2, 4 * columns**2, columns**2, columns, 0, 0,
        8, 4, 256, columns, 2, 1, 16,
        COLUMNS=columns, NORMALIZE=normalize, num_warps=warps, grid=(1,), warmup=True,
    )  # fmt: skip
    log = ptxas_log(compiled)
    return {
        "registers": [int(n) for n in re.findall(r"Used (\d+) registers", log)],
        "warps": warps,
        "spilled_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill", log)),
    }


if __name__ == "__main__":
    print(json.dumps(report(*json.loads(sys.argv[1]))))
