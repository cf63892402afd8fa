"""The Hopper kernels compile without a GPU, fit, and spill nothing worth mentioning.

In a separate process: Gluon compiles only where Triton does not interpret.
"""

import json
import re
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
from s2train.kernels import BlockLayout, TopKLayout
from s2train.kernels.spec import AttentionSpec
from torch import Tensor

from tests.kernels.hopper_target import SHARED_BYTES, Driver, ptxas_log
from tests.program import reported

TRITON_36 = triton.__version__.startswith("3.6.")
# Of all threads' roles, stores and loads; none of them in a loop over unmasked steps.
SPILLED_BYTES = {
    # weights are carried in float32 from step to step
    ("forward", "whole"): 64 if TRITON_36 else 80,
    ("forward", "batched"): 64 if TRITON_36 else 80,
    # and the addresses of partial tiles, which are stored after the loops
    ("forward", "offset"): 160,
    ("forward", "packed"): 160,
    ("backward", "whole"): 32 if TRITON_36 else 48,
    ("backward", "packed"): 128,  # the stores of a partial tile
    ("backward", "split"): 64,  # where a program's sums go
    ("backward", "128 queries"): 128,
    ("backward", "128 queries, split"): 128,
}
# direction, dtype, head dimensions of q and v, block, causal, what the rows are ("whole" tiles, "offset", "packed";
# "batched": whole, and each sequence has separate masks; "split": whole, and programs share key tiles; "128
# queries": whole, and steps of so many; or several)
CASES = [
    ("forward", "bfloat16", 128, 128, 128, True, "whole"),
    ("forward", "bfloat16", 128, 128, 64, True, "whole"),
    ("forward", "float16", 128, 128, 64, False, "whole"),
    ("forward", "bfloat16", 64, 64, 64, True, "whole"),
    ("forward", "bfloat16", 128, 64, 128, True, "whole"),
    *(
        ("forward", dtype, dim, v_dim, block, True, rows)
        for rows in ("offset", "packed")
        for dtype, dim, v_dim, block in (
            ("bfloat16", 128, 128, 128),
            ("bfloat16", 128, 128, 64),
            ("float16", 128, 80, 64),
            ("bfloat16", 64, 64, 64),
            ("bfloat16", 128, 40, 128),
        )
    ),
    ("forward", "bfloat16", 128, 128, 64, False, "offset"),
    ("forward", "bfloat16", 128, 128, 128, True, "batched"),
    ("forward", "bfloat16", 128, 128, 64, True, "batched"),
    ("backward", "bfloat16", 128, 128, 128, True, "whole"),
    ("backward", "bfloat16", 128, 128, 64, False, "whole"),
    ("backward", "float16", 128, 128, 128, True, "whole"),
    ("backward", "bfloat16", 64, 64, 128, True, "whole"),
    ("backward", "float16", 64, 64, 64, True, "whole"),
    ("backward", "bfloat16", 128, 128, 128, True, "split"),
    ("backward", "float16", 128, 128, 64, False, "split"),
    ("backward", "bfloat16", 64, 64, 64, True, "split"),
    ("backward", "bfloat16", 128, 128, 128, True, "packed"),
    ("backward", "float16", 128, 128, 64, True, "packed"),
    ("backward", "bfloat16", 64, 64, 64, True, "packed"),
    ("backward", "bfloat16", 64, 64, 128, True, "128 queries"),
    ("backward", "float16", 64, 64, 128, False, "128 queries"),
    ("backward", "bfloat16", 64, 64, 128, True, "128 queries, split"),
    ("backward", "float16", 64, 64, 256, False, "128 queries, split"),
]
Case = tuple[str, str, int, int, int, bool, str]


# What models are trained with; packed documents compile the code of "offset" too. A compilation takes six seconds;
# `make test-all` does the others too.
COMMON = {
    ("forward", "bfloat16", 128, 128, 64, True, "packed"),
    ("backward", "bfloat16", 128, 128, 128, True, "packed"),
}
assert set(CASES) >= COMMON


@pytest.mark.slow
@pytest.mark.skipif(not triton.__version__.startswith(("3.6.", "3.7.")), reason="Triton 3.6 or 3.7")
@pytest.mark.parametrize(
    "case", [case if case in COMMON else pytest.param(case, marks=pytest.mark.long) for case in CASES], ids=str
)
def test_compiles_for_hopper(case: Case) -> None:
    found = reported(__name__, case)
    assert found["shared"] <= SHARED_BYTES
    assert found["spilled_bytes"] <= SPILLED_BYTES[case[0], case[6]], found
    assert found["warnings"] == []


@pytest.mark.slow
@pytest.mark.parametrize("block", [128, *(pytest.param(block, marks=pytest.mark.long) for block in (64, 256))])
@pytest.mark.parametrize("rows", ["whole", pytest.param("split", marks=pytest.mark.long)])
def test_what_builds_the_work_of_top_k_lists_compiles(block: int, rows: str) -> None:
    found = reported(__name__, ("top-k", "bfloat16", 128, 128, block, True, rows))
    assert found["kernels"] == [
        "s2_attention_kernel_topk_steps", "s2_attention_kernel_topk_bits", "s2_attention_kernel_topk_pairs",
        *(["s2_attention_kernel_topk_cut"] if rows == "split" else []), "s2_attention_kernel_topk_order",
    ]  # fmt: skip
    assert found["spilled_bytes"] == 0, found


def compiled_forward(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, spec: AttentionSpec) -> Any:
    from s2train.kernels.hopper.documents import s2_attention_kernel_document_tiles
    from s2train.kernels.hopper.forward import ENTRY_REGISTERS, launch_arguments, s2_attention_fwd_kernel_hopper
    from s2train.kernels.hopper.forward_config import CONFIGS

    config = CONFIGS[q.shape[3], min(layout.block_size, 128)]
    documents = None
    if spec.cu_seqlens is not None:
        documents = torch.empty(4, 4, dtype=torch.int32)
        s2_attention_kernel_document_tiles.run(
            spec.cu_seqlens, documents, 2, 128, 64, 64, 4, grid=(1,), warmup=True, num_warps=4
        )
    out, lse = torch.empty_like(v), torch.empty(1, 2, 256)
    _, arguments, constants = launch_arguments(q, k, v, out, lse, documents, layout, spec, config)
    arguments += constants
    return s2_attention_fwd_kernel_hopper.run(*arguments, grid=(1,), warmup=True, num_warps=4, maxnreg=ENTRY_REGISTERS)


def compiled_backward(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, spec: AttentionSpec, rows: str) -> Any:
    from s2train.kernels.hopper.backward import (
        ENTRY_REGISTERS,
        launch_arguments,
        s2_attention_bwd_kernel_hopper,
    )
    from s2train.kernels.hopper.backward_config import config_of
    from s2train.kernels.hopper.backward_schedule import ScheduleOptions
    from s2train.kernels.hopper.call_schedule import schedule_of_call
    from s2train.kernels.hopper.pair_parts import PairParts

    config = config_of(q.shape[3], ScheduleOptions(query_tile=128 if "128 queries" in rows else 64))
    schedule = schedule_of_call(layout, 2, 256, 256, spec, 1, config.schedule)
    parts = None
    if spec.split_columns:
        numbers = torch.zeros(4, 6, dtype=torch.int32)
        schedule, parts = replace(schedule, parts=PairParts(numbers[0], numbers, 4)), torch.empty(4, 1, 2, 64)
    statistics = torch.empty(2, 2 * 256)
    sums = torch.empty(2 * 4 * 2 * q.shape[3], 32)
    arguments = launch_arguments(q, k, v, q, *statistics, sums, k, v, parts, schedule, 1, spec, config)
    return s2_attention_bwd_kernel_hopper.run(*arguments, grid=(1,), warmup=True, num_warps=4, maxnreg=ENTRY_REGISTERS)


def compiled_builders(block: int, split: bool) -> list[Any]:
    """Kernels compiled for lists of 16 of 256 blocks."""
    from s2train.kernels.hopper import pair_parts, topk_backward_schedule, topk_forward_schedule

    kernels = []

    def compiling(kernel: Any, grid: Any, arguments: Any, **options: Any) -> None:
        kernels.append(kernel.run(*arguments, grid=grid, warmup=True, num_warps=options["num_warps"]))

    for module in (pair_parts, topk_backward_schedule, topk_forward_schedule):
        module.launch = compiling  # type: ignore[attr-defined]
    indices = torch.zeros(1, 2, 256, 16, dtype=torch.int32)
    layout = TopKLayout.from_indices(indices, block, num_heads=4)
    topk_forward_schedule.topk_forward_schedule(layout, causal=True, s_k=256 * block)
    topk_backward_schedule.topk_backward_schedule(layout, 2, 256 * block, 256 * block, 0, True, split)
    return kernels


def report(direction: str, dtype: str, dim: int, v_dim: int, block: int, causal: bool, rows: str) -> dict[str, Any]:
    triton.runtime.driver.set_active(Driver())
    if direction == "top-k":
        kernels = compiled_builders(block, rows == "split")
        log = "".join(ptxas_log(kernel) for kernel in kernels)
        return {
            "kernels": [kernel.metadata.name for kernel in kernels],
            "spilled_bytes": sum(int(x) for x in re.findall(r"(\d+) bytes spill", log)),
            "registers": re.findall(r"Used (\d+) registers", log),
        }
    q, k, v = (torch.empty(2, 2, 256, d, dtype=getattr(torch, dtype)) for d in (dim, dim, v_dim))
    batch = (2,) if rows == "batched" else ()
    layout = BlockLayout.from_mask(torch.ones(*batch, 2, 256 // block, 256 // block) > 0, block)
    bounds = torch.tensor([0, 100, 256], dtype=torch.int32) if rows == "packed" else None
    offset = 65 if rows == "offset" else 0
    spec = AttentionSpec(0.1, causal, offset, bounds, "bhsd", split_columns="split" in rows)
    if direction == "forward":
        kernel = compiled_forward(q, k, v, layout, spec)
    else:
        kernel = compiled_backward(q, k, v, layout, spec, rows)
    log = ptxas_log(kernel)
    return {
        "shared": kernel.metadata.shared,
        "spilled_bytes": sum(int(x) for x in re.findall(r"(\d+) bytes spill", log)),
        "registers": max(int(x) for x in re.findall(r"Used (\d+) registers", log)),
        "warnings": [line for line in log.splitlines() if "warning" in line.lower() or "serialized" in line],
    }


if __name__ == "__main__":
    print(json.dumps(report(*json.loads(sys.argv[1]))))
