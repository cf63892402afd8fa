"""Compares context parallel attention in fp32 with one process and float64.

Run it with torchrun on all devices:

`python -m torch.distributed.run --nproc-per-node N -m s2train.scaling.exactness OUTPUT.json RECORDED.json`
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from s2train.config import ParallelConfig
from s2train.distributed.agreement import over_ranks
from s2train.files import write_json
from s2train.kernels.attention import block_sparse_attention
from s2train.kernels.reference import reference_attention
from s2train.kernels.relative_error import largest, relative_error
from s2train.megatron import setup
from s2train.megatron.context_parallel.all_gather import own_rows
from s2train.scaling.cases import Case, Shape
from s2train.scaling.exchange_modes import exchange_modes
from s2train.scaling.recorded import Recorded

NAMES = ("out", "dq", "dk", "dv")
CASES = (Case(64, 2, 4, "shifted"), Case(64, 1, 4, "grouped"), Case(128, 2, 8, "shifted"))


def exactness(case: Case, shape: Shape, device: torch.device) -> dict[str, Any]:
    """Measure relative errors of every exchange mode against float64.

    Each is the largest over the ranks. `one` is one process in fp32.
    """
    group = parallel_state.get_context_parallel_group()
    rank, size = group.rank(), group.size()
    layout = case.layer(shape).block_layout(shape.length, device=device)
    torch.manual_seed(1)  # the same inputs on every rank
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    whole = [torch.randn(shape.length, 1, count, shape.dim).to(device) for count in heads]

    own = partial(own_rows, rank=rank, size=size)

    def results(attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor]) -> list[Tensor]:
        q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
        out = attend(q, k, v)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])]

    exact = results(lambda q, k, v: reference_attention(q, k, v, layout)[0], [x.double() for x in whole])
    found = {"one": [own(x) for x in results(partial(block_sparse_attention, layout=layout), whole)]}
    for name, attend in exchange_modes(layout, group).items():
        found[name] = results(attend, [own(x) for x in whole])
    errors = {
        mode: {name: relative_error(x, own(x64)) for name, x, x64 in zip(NAMES, xs, exact, strict=True)}
        for mode, xs in found.items()
    }
    ranks = over_ranks(errors)
    return {mode: {name: largest(of_rank[mode][name] for of_rank in ranks) for name in NAMES} for mode in errors}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("recorded", type=Path, help="file of measured cases, which are not measured again")
    parser.add_argument("--length", type=int, default=4096)
    given = parser.parse_args()
    device = setup.initialize(ParallelConfig(cp=int(os.environ["WORLD_SIZE"])), seed=1)
    shape = Shape(given.length, heads=6, kv_heads=2, dim=64)
    recorded = Recorded(given.recorded)
    errors = {
        case.name: recorded.on_all_ranks(f"cp attention {case.name}", partial(exactness, case, shape, device))
        for case in CASES
    }
    agrees = all(
        error[mode][name] <= 2 * error["one"][name] for error in errors.values() for mode in error for name in NAMES
    )
    if torch.distributed.get_rank() == 0:
        write_json(given.output, {"length": given.length, "errors": errors, "agrees": agrees})
    setup.shutdown()


if __name__ == "__main__":
    main()
