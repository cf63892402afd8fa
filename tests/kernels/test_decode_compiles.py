"""The decode kernel compiles for Hopper without a GPU, spills nothing, and loads keys and values ahead.

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

# dtype, head dimension, block, walk
CASES = [
    ("bfloat16", 128, 64, "bits"),
    *(
        pytest.param(case, marks=pytest.mark.long)
        for case in (
            ("bfloat16", 128, 128, "dense"),
            ("bfloat16", 128, 128, "uniform"),
            ("float16", 64, 16, "bits"),
            ("float32", 128, 64, "bits"),
            ("bfloat16", 256, 64, "uniform"),
        )
    ),
]
Case = tuple[str, int, int, str]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_for_hopper(case: Case) -> None:
    found = reported(__name__, case)
    assert found["spilled_bytes"] == 0
    # Several tiles of keys and values fit in what it takes: with one, no load would run ahead.
    assert 2 * found["tile_bytes"] <= found["shared"] <= SHARED_BYTES


def report(dtype: str, dim: int, block: int, walk: str) -> dict[str, Any]:
    from s2train.kernels.decode.kernels import s2_decode_kernel, tile_sizes

    triton.runtime.driver.set_active(Driver())
    element = getattr(torch, dtype)
    steps, stages = tile_sizes(dim, dim, element, SHARED_BYTES)
    q, pages, parts = torch.empty(2, 32, dim, dtype=element), torch.empty(9, block, dim, dtype=element), torch.empty(64)
    table, positions, index = (torch.zeros(n, dtype=torch.int32) for n in (64, 2, 64))
    walked = (None,) * 4 if walk == "dense" else (index, index, index, index if walk == "bits" else None)
    kernel = s2_decode_kernel.run(
        q, pages, pages, table, positions, *walked, parts, parts, 32 * dim, dim, 512, 64, 0.1, 4, 32, 64, 64, 8,
        DIM=dim, V_DIM=dim, PADDED_DIM=dim, PADDED_V_DIM=dim, PAGE=block, ROWS=16, STEPS=steps,
        DENSE=walk == "dense", UNIFORM=walk != "bits", num_warps=4, num_stages=stages, grid=(1,), warmup=True,
    )  # fmt: skip
    log = ptxas_log(kernel)
    return {
        "shared": kernel.metadata.shared,
        "tile_bytes": steps * 2 * dim * element.itemsize,
        "spilled_bytes": sum(int(x) for x in re.findall(r"(\d+) bytes spill", log)),
    }


if __name__ == "__main__":
    print(json.dumps(report(*json.loads(sys.argv[1]))))
