"""The kernels of block statistics compile for Hopper without a GPU, and spill nothing worth mentioning.

In a separate process: Triton compiles only where it does not interpret.
"""

import json
import re
import sys
from typing import Any

import pytest
import torch
import triton

from tests.kernels.hopper_target import SHARED_BYTES, Driver, ptxas_log
from tests.program import reported

# kernel, dtype, head dimension, block; the long ones are parts of the others
CASES = [
    ("listed mass", "bfloat16", 128, 128),
    ("rules", "bfloat16", 128, 128),
    pytest.param(("mass", "bfloat16", 128, 128), marks=pytest.mark.long),
    pytest.param(("effects", "bfloat16", 128, 128), marks=pytest.mark.long),
]
Case = tuple[str, str, int, int]
SPILLED_BYTES = {"rules": 8} if triton.__version__.startswith("3.9.") else {}  # a store and a load


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_for_hopper(case: Case) -> None:
    found = reported(__name__, case)
    assert found["spilled_bytes"] <= SPILLED_BYTES.get(case[0], 0)
    assert found["shared"] <= SHARED_BYTES


def report(kernel: str, dtype: str, dim: int, block: int) -> dict[str, Any]:
    from s2train.kernels.block_statistics import effects_kernel, mass_kernel
    from s2train.kernels.configs import config_for

    triton.runtime.driver.set_active(Driver())
    element = getattr(torch, dtype)
    x, rows, lists = torch.empty(2, 32, dim, dtype=element), torch.empty(64), torch.empty(64, dtype=torch.int32)
    strides = (4096 * dim, dim, 32 * dim)
    if kernel.endswith("mass"):
        config = config_for("forward", block, dim, dim, element, SHARED_BYTES)
        listed = kernel == "listed mass"
        compiled = mass_kernel.s2_block_mass_kernel.run(
            x, x, rows, lists if listed else None, rows, *strides, *strides,
            0.1, 32, 4, 4096, 4096, 0, 0, 32, 16 if listed else 32, 32,
            DIM=dim, PADDED_DIM=dim, BLOCK=block, ROWS=config.rows, STEPS=config.steps, SLOTS=16 if listed else 1,
            CAUSAL=True, LISTED=listed, num_warps=config.num_warps, num_stages=config.num_stages,
            grid=(1,), warmup=True,
        )  # fmt: skip
    else:
        config = config_for("dq", block, dim, dim, element, SHARED_BYTES)
        constants = effects_kernel.constants(x, x, block, config, True)
        sizes = (0.1, 32, 4, 1, 4096, 4096, 0, 0, 32, 32)
        tensors = (x, x, x, x, rows, rows)
        if kernel == "effects":
            compiled = effects_kernel.s2_block_effects_kernel.run(
                *tensors, rows, *strides * 4, *sizes, **constants, grid=(1,), warmup=True
            )
        else:
            rules = torch.empty(64, dtype=torch.uint8)
            compiled = effects_kernel.s2_rule_effects_kernel.run(
                *tensors, rules, rows, *strides * 4, 12288, 1024, 32, *sizes, 12,
                RULES=effects_kernel.RULES_AT_ONCE, **constants, grid=(1,), warmup=True,
            )  # fmt: skip
    log = ptxas_log(compiled)
    return {
        "shared": compiled.metadata.shared,
        "registers": [int(n) for n in re.findall(r"Used (\d+) registers", log)],
        "warps": config.num_warps,
        "spilled_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill", log)),
    }


if __name__ == "__main__":
    print(json.dumps(report(*json.loads(sys.argv[1]))))
