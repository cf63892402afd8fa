"""Check and time attention statistics per block pair in models' shapes.

Head dimension 128, blocks of 128, 32 query and 8 KV heads, one sequence, bfloat16. A case's result is compared with the
float64 oracle on the query blocks at the start, in the middle and at the end, then timed beside dense attention's
forward pass. The error must be at most twice that of torch with products in bfloat16. Results are written after each
case.

Predicted for an H100, before the first run: a step of 128 x 128 pairs takes 1,024 clocks of a multiprocessor's tensor
cores for each product, and 1,024 for the exponentials, at best one beside the other. With half of that hidden, `mass`
has 390 TFLOP/s: 11 ms at 32k and 180 ms at 128k, of 4.4e12 and 7.0e13 FLOPs. `listed` (top 16) reads 16 of 256 or 1,024
blocks: 1.7 and 6.8 ms. `effects` has two products and four sums over rows a step, at 250 TFLOP/s: 2.2 ms at 8k, 35 ms
at 32k. `rules` (8 of them) as `effects`, at 200 TFLOP/s: 2.8 and 44 ms.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import triton
from torch import Tensor

from ..attention import block_sparse_attention
from ..block_statistics import block_effects, block_mass, output_delta, rule_effects
from ..block_statistics.reference import reference_block_effects, reference_mass, reference_rule_effects
from ..block_statistics.spec import EffectInputs, StatisticSpec
from ..layout import BlockLayout
from ..provenance import origin
from ..relative_error import relative_error
from ..spec import to_bhsd
from ..topk_layout import TopKLayout
from .program import add_output, check_output, write_results
from .timing import Clock

Record = dict[str, Any]
DEFAULT = ("mass-32k", "mass-128k", "listed-32k", "listed-128k", "effects-8k", "effects-32k", "rules-8k", "rules-32k")
STATISTICS = ("mass", "listed", "effects", "rules")
HEADS, KV_HEADS, DIM, BLOCK, TOP_K, RULES = 32, 8, 128, 128, 16, 8


@dataclass(frozen=True)
class Case:
    """One statistic at one length."""

    statistic: str
    length: int

    @classmethod
    def parse(cls, word: str) -> Case:
        """Read a word such as mass-32k; raise ValueError if it isn't one."""
        statistic, _, length = word.partition("-")
        digits = length.removesuffix("k")
        if statistic not in STATISTICS or not digits.isdecimal() or int(digits) < 1:
            raise ValueError(f"{word!r} is no case: write {' or '.join(STATISTICS)}, and a length such as 32k")
        return cls(statistic, int(digits) * (1024 if length.endswith("k") else 1))

    @property
    def flops(self) -> float:
        """FLOPs of products over all visible pairs, or over listed blocks."""
        blocks = -(-self.length // BLOCK)
        pairs = self.length * (self.length + 1) / 2
        if self.statistic == "listed":
            pairs = sum(min(row + 1, TOP_K) for row in range(blocks)) * BLOCK**2
        products = 1 if self.statistic in ("mass", "listed") else 2
        return 2.0 * products * DIM * HEADS * pairs


class Inputs:
    """Random inputs of attention and its statistics, for one length.

    They are q, k, v, dout, the results of dense attention, lists and rules.
    """

    def __init__(self, length: int, device: torch.device) -> None:
        self.length, self.blocks = length, -(-length // BLOCK)
        dtype = torch.bfloat16
        self.q, self.dout = (torch.randn(length, 1, HEADS, DIM, device=device, dtype=dtype) for _ in range(2))
        self.k, self.v = (torch.randn(length, 1, KV_HEADS, DIM, device=device, dtype=dtype) for _ in range(2))
        every = torch.ones(1, self.blocks, self.blocks, dtype=torch.bool, device=device)
        self.dense = BlockLayout.from_patterns(every, [0] * HEADS, BLOCK)
        out, self.lse = self.attend()
        self.delta = output_delta(out, self.dout)
        scores = torch.rand(1, KV_HEADS, self.blocks, self.blocks, device=device).tril()
        slots = min(TOP_K, self.blocks)
        best, indices = scores.topk(slots, -1)
        indices = indices.masked_fill(best == 0, -1)
        self.lists = TopKLayout.from_indices(indices, BLOCK, num_heads=HEADS)
        self.rules = torch.rand(1, RULES, self.blocks, self.blocks, device=device) < 0.5

    def attend(self) -> tuple[Tensor, Tensor]:
        """Run dense attention by the sparse op with every block kept."""
        return block_sparse_attention(self.q, self.k, self.v, self.dense, return_lse=True)

    def run(self, statistic: str) -> Tensor:
        """Compute a statistic of the whole sequence."""
        if statistic == "mass":
            return block_mass(self.q, self.k, self.lse, block_size=BLOCK)
        if statistic == "listed":
            return block_mass(self.q, self.k, self.lse, block_size=BLOCK, layout=self.lists)
        arguments = (self.q, self.k, self.v, self.lse, self.dout, self.delta)
        if statistic == "effects":
            return block_effects(*arguments, block_size=BLOCK)
        return rule_effects(*arguments, self.rules, block_size=BLOCK)

    def oracle(self, statistic: str, block: int, dtype: torch.dtype) -> Tensor:
        """Compute one query block's statistic in torch, with products in `dtype`.

        log-sum-exp and delta are the given ones, in float32 or more.
        """
        start, stop = block * BLOCK, min((block + 1) * BLOCK, self.length)
        precise = torch.promote_types(dtype, torch.float32)
        q, dout = (to_bhsd(x[start:stop], "sbhd").to(dtype) for x in (self.q, self.dout))
        k, v = (to_bhsd(x[:stop], "sbhd").to(dtype) for x in (self.k, self.v))
        lse, delta = (x[:, :, start:stop].to(precise) for x in (self.lse, self.delta))
        spec = StatisticSpec(BLOCK, DIM**-0.5, True, start)
        if statistic in ("mass", "listed"):
            layout = self.lists if statistic == "listed" else None
            return reference_mass(q, k, lse, spec, layout)
        inputs = EffectInputs(q, k, v, lse, dout, delta)
        if statistic == "effects":
            return reference_block_effects(inputs, spec)
        rules = self.rules[:, :, block : block + 1, : -(-stop // BLOCK)].expand(HEADS, -1, -1, -1)
        return reference_rule_effects(inputs, rules, spec)


def errors(case: Case, inputs: Inputs, result: Tensor) -> tuple[float, float]:
    """Return the relative errors of `result` and of torch in bfloat16.

    Both are against float64, over the first, the middle and the last query block.
    """
    mine, plain, exact = [], [], []
    for block in sorted({0, inputs.blocks // 2, inputs.blocks - 1}):
        exact.append(inputs.oracle(case.statistic, block, torch.float64).flatten())
        plain.append(inputs.oracle(case.statistic, block, torch.bfloat16).flatten())
        part = result[..., block] if case.statistic == "rules" else result[:, :, block]
        if case.statistic in ("mass", "effects"):
            part = part[..., : block + 1]
        mine.append(part.flatten())
    x64 = torch.cat(exact)
    return relative_error(torch.cat(mine), x64), relative_error(torch.cat(plain), x64)


def measure(case: Case, device: torch.device, clock: Clock) -> Record:
    """Check a case, and time it beside dense attention's forward pass."""
    inputs = Inputs(case.length, device)
    result = inputs.run(case.statistic)
    error, plain = errors(case, inputs, result)
    clock.wait()
    del result
    ms = {"statistic": _milliseconds(partial(inputs.run, case.statistic), clock)}
    ms["dense forward"] = _milliseconds(inputs.attend, clock)
    return {
        "case": f"{case.statistic}-{case.length}",
        "ms": ms,
        "tflops": case.flops / ms["statistic"] / 1e9,
        "over_dense_forward": ms["statistic"] / ms["dense forward"],
        "error": error,
        "error_of_torch": plain,
        "ok": error <= 2 * plain,
    }


def _milliseconds(run: Callable[[], object], clock: Clock) -> float:
    def one() -> tuple[Any, Any]:
        clock.start()
        before = clock.mark()
        run()
        return before, clock.mark()

    one()
    clock.wait()
    spans = [one() for _ in range(5)]
    clock.wait()
    return median(clock.milliseconds(*span) for span in spans)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if a result is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m s2train.kernels.benchmarks.block_statistics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", default=DEFAULT, help=f"default: {' '.join(DEFAULT)}")
    add_output(parser, "block-statistics")
    args = parser.parse_args(arguments)
    check_output(parser, args)
    try:
        cases = [Case.parse(word) for word in args.cases]
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("needs a GPU: these lengths take hours on a CPU")
    device = torch.device("cuda")
    clock = Clock(device)
    data: Record = {
        **origin("kernels.benchmarks.block_statistics", arguments),
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cases": [],
    }
    for case in cases:
        record = measure(case, device, clock)
        data["cases"].append(record)
        write_results(data, args.output)
        print(
            f"{record['case']}: {record['ms']['statistic']:.2f} ms, {record['tflops']:.0f} TFLOP/s, "
            f"{record['over_dense_forward']:.2f} of dense attention's forward, error {record['error']:.1e} "
            f"({'right' if record['ok'] else 'WRONG'}; torch in bfloat16 {record['error_of_torch']:.1e})",
            flush=True,
        )
    return int(not all(record["ok"] for record in data["cases"]))


if __name__ == "__main__":
    sys.exit(main())
