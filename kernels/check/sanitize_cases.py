"""Small problems for compute-sanitizer.

`python -m s2train.kernels.check.sanitize_cases NAME` computes output and gradients of one problem, compares nothing,
and prints which kernels ran. On an H100 both paths run: blocks of 64 and 128 in bfloat16 use Hopper's kernels where
possible.
"""

from __future__ import annotations

import sys

import torch

from ..attention import block_sparse_attention
from .cases import Case
from .run import kernels_run, problem

DONE = "S2TRAIN DONE"
"""What a case prints as its last line."""

# every case's last tile is partly empty; masks are random, so that kept and dropped blocks mix
CASES = {
    case.name: case
    for case in (
        Case("MHA, block 128", heads=2, kv_heads=2, block=128, s_q=601, keep=0.5),
        Case("GQA, block 64", heads=4, kv_heads=2, block=64, s_q=333, keep=0.5),
        Case("packed, block 128", heads=2, kv_heads=1, block=128, documents=(37, 0, 300, 1, 200), keep=0.6),
        Case("offset 256, block 64", heads=2, kv_heads=1, block=64, s_q=300, query_offset=256, keep=0.4),
        Case("d 64, block 64", heads=2, kv_heads=1, dim=64, block=64, s_q=333, keep=0.5),
        Case("128 queries, block 128", heads=4, kv_heads=2, dim=64, block=128, s_q=333, keep=0.6),
        Case("second pairs, block 64", heads=8, kv_heads=1, block=64, s_q=700, keep=0.5, causal=False),
        Case("deterministic, block 128", heads=4, kv_heads=2, block=128, s_q=333, deterministic=True),
        Case("float32, d 64", dtype="float32", heads=2, kv_heads=1, dim=64, block=64, s_q=200),
        Case("block 16, d 80", heads=2, kv_heads=2, dim=80, block=16, s_q=150),
        Case("packed, block 32", heads=2, kv_heads=1, block=32, documents=(37, 0, 130, 1)),
    )
}


def run(case: Case, device: torch.device) -> dict[str, str]:
    """Compute output, log-sum-exp and gradients of both; return which kernels ran.

    Raises RuntimeError if any result is NaN.
    """
    inputs, layout, options = problem(case, device)
    q, k, v = (x.requires_grad_() for x in inputs)
    torch.use_deterministic_algorithms(case.deterministic)
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True, **options)
    gradients = torch.autograd.grad((out, lse), (q, k, v), (torch.randn_like(out), torch.randn_like(lse)))
    kernels = kernels_run(q, k, v, layout, **options)
    for name, x in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), strict=True):
        if x.isnan().any():
            raise RuntimeError(f"{case.name}: {name} has NaN")
    return kernels


def main() -> int:
    kernels = run(CASES[sys.argv[1]], torch.device("cuda"))
    torch.cuda.synchronize()
    print(f"{DONE} forward {kernels['forward']}, backward {kernels['backward']} {kernels['choices']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
