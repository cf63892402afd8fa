"""The kernels of HyperAttention compile for Hopper without a GPU, and fit in its shared memory.

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

ATTENTION = ("hash", "sample_fwd", "bucket_fwd", "sample_dq", "sample_dkdv", "bucket_dq", "bucket_dkdv")
PLAN = ("tag", "search", "locate")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "causal"),
    [(64, True), *(pytest.param(*case, marks=pytest.mark.long) for case in ((128, True), (64, False)))],
)
def test_compile_for_hopper(dim: int, causal: bool) -> None:
    found = reported(__name__, [dim, causal])
    assert set(found) == {f"s2_hyper_{name}_kernel" for name in (*ATTENTION, *PLAN)}
    for name, kernel in found.items():
        assert kernel["shared"] <= SHARED_BYTES, name
        # what is kept over all steps of dk and dv is more than a program's registers
        assert kernel["spilled_bytes"] <= (256 if "dkdv" in name else 16), name
    # gathered rows are loaded ahead: not every wait is for all loads
    for name in ("bucket_fwd", "bucket_dq", "bucket_dkdv"):
        assert max(found[f"s2_hyper_{name}_kernel"]["waits"]) > 0, name


def report(dim: int, causal: bool) -> dict[str, Any]:
    """Compile what one forward and backward launches, without launching it."""
    from s2train.kernels.hyper import HyperSettings, launches, plan_kernels
    from s2train.kernels.hyper.plan import make_plan, ranges_of
    from s2train.kernels.spec import AttentionSpec

    triton.runtime.driver.set_active(Driver())
    launches.shared_limit = lambda device: SHARED_BYTES  # type: ignore[assignment]
    found: dict[str, Any] = {}
    for module, names in ((launches, ATTENTION), (plan_kernels, PLAN)):
        for name in names:
            kernel = f"s2_hyper_{name}_kernel"
            setattr(module, kernel, Compiled(getattr(module, kernel), found))
    settings, length = HyperSettings(), 2048
    q, k = (torch.zeros(1, heads, length, dim, dtype=torch.bfloat16) for heads in (8, 2))
    call = launches.call_of(q, k, k, settings, AttentionSpec(0.1, causal, 0, None, "bhsd"))
    launches.hash_all(q, k, torch.arange(2), settings.projections)
    ranks = [torch.randint(65536, (1, heads, length), dtype=torch.int32) for heads in (8, 2)]
    ranges = ranges_of(settings, length, causal, 2, 4)
    ordered, _ = plan_kernels.sort_keys(ranks[1], ranges, settings, causal)
    _, of_all, buckets = plan_kernels.find_buckets(ranks[0], ordered, ranges, settings, 2, causal)
    plan_kernels.sort_queries(of_all, buckets, ranges, length, 2, 4, settings, causal)
    plan = make_plan(*ranks, settings, torch.arange(2), causal)
    k_s = launches.sampled(k, plan)
    lse = torch.zeros(1, 8, length)
    sums, _ = launches.sample_forward(q, k_s, k_s, (q, lse), plan, call)
    launches.bucket_forward(q, k, k, sums, lse, plan, call)
    rows, grads = launches.Rows(q, q, lse, lse), torch.zeros(2, *k.shape)
    launches.bucket_dq(rows, k, k, launches.sample_dq(rows, k_s, k_s, q, plan, call), plan, call)
    launches.sample_dkdv(rows, k_s, k_s, *grads, plan, call)
    launches.bucket_dkdv(rows, k, k, *grads, plan, call)
    return found


class Compiled:
    """Stands in for a kernel: compiles it for a launch's arguments, and notes what it takes."""

    def __init__(self, kernel: Any, found: dict[str, Any]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.compile

    def compile(self, *arguments: Any, **options: Any) -> None:
        kernel = self.kernel.run(*arguments, grid=(1,), warmup=True, **options)
        log = ptxas_log(kernel)
        self.found[self.kernel.fn.__name__] = {
            "shared": kernel.metadata.shared,
            "spilled_bytes": sum(int(x) for x in re.findall(r"(\d+) bytes spill stores", log)),
            "waits": [int(x) for x in re.findall(r"cp.async.wait_group\s+(\d+)", kernel.asm["ptx"])],
        }


if __name__ == "__main__":
    print(json.dumps(report(*json.loads(sys.argv[1]))))
