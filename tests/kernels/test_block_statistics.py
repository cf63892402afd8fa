"""Statistics of attention per block pair: against their definitions in float64, in torch and in Triton's kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from s2train.kernels import BlockLayout, TopKLayout, reference_attention, spec
from s2train.kernels.block_statistics import block_effects, block_mass, mass_kernel, output_delta, rule_effects
from s2train.kernels.block_statistics.reference import (
    reference_block_effects,
    reference_mass,
    reference_rule_effects,
)
from s2train.kernels.block_statistics.spec import EffectInputs, StatisticSpec
from s2train.kernels.spec import from_bhsd, to_bhsd
from torch import Tensor

BACKENDS = ("torch", "triton")


@dataclass(frozen=True)
class Problem:
    """Random q, k, v, dout of one call, and dense attention's log-sum-exp and delta in float64."""

    heads: int = 2
    kv_heads: int = 1
    s_q: int = 45
    s_k: int = 45
    dim: int = 16
    v_dim: int = 16
    block: int = 16
    batch: int = 1
    offset: int = 0
    causal: bool = True
    dtype: torch.dtype = torch.float32
    format: str = "sbhd"
    sharpness: float = 1.0  # factor of the scores

    @property
    def blocks(self) -> tuple[int, int, int]:
        """First query block, and the numbers of query and key blocks of the call."""
        first = self.offset // self.block
        return first, -(-(self.offset + self.s_q) // self.block) - first, -(-self.s_k // self.block)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "block_size": self.block, "query_offset": self.offset, "causal": self.causal, "format": self.format
        }  # fmt: skip

    def make(self, device: torch.device) -> Inputs:
        shapes = [(self.heads, self.s_q, self.dim), (self.kv_heads, self.s_k, self.dim)]
        shapes += [(self.kv_heads, self.s_k, self.v_dim), (self.heads, self.s_q, self.v_dim)]
        q, k, v, dout = (torch.randn(self.batch, *shape, device=device) for shape in shapes)
        q = q * self.sharpness
        q, k, v, dout = (from_bhsd(x.to(self.dtype), self.format).contiguous() for x in (q, k, v, dout))
        first, n_q, n_k = self.blocks
        mask = torch.ones(self.heads, first + n_q, n_k, dtype=torch.bool, device=device)
        out, lse = self.attend(mask, *(x.double() for x in (q, k, v)))
        return Inputs(q, k, v, lse, dout, output_delta(out, dout.double(), format=self.format))

    def attend(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        layout = BlockLayout.from_mask(mask, self.block)
        return reference_attention(
            q, k, v, layout, causal=self.causal, query_offset=self.offset, format=self.format
        )  # fmt: skip

    def probabilities(self, inputs: Inputs) -> Tensor:
        """A, as one matrix for each head."""
        q, k = (to_bhsd(x, self.format).double() for x in (inputs.q, inputs.k))
        scores = q @ k.repeat_interleave(self.heads // self.kv_heads, 1).mT / math.sqrt(self.dim)
        position = torch.arange(self.s_q, device=q.device) + self.offset
        if self.causal:
            scores = scores.masked_fill(torch.arange(self.s_k, device=q.device) > position[:, None], -torch.inf)
        return (scores - inputs.lse[..., None]).exp()

    def rows(self, block: int) -> slice:
        """Rows of the call in the `block`-th of its query blocks."""
        start = (self.offset // self.block + block) * self.block - self.offset
        return slice(max(start, 0), min(start + self.block, self.s_q))


class Inputs(EffectInputs):
    def cast(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """q, k, v, lse, dout, delta as the ops take them in a dtype; default: as they are."""
        precise = torch.promote_types(dtype or self.q.dtype, torch.float32)
        x = self if dtype is None else self.with_products_in(dtype)
        return x.q, x.k, x.v, x.lse.to(precise), x.dout, x.delta.to(precise)


CASES = {
    "gqa": Problem(),
    "kv_heads": Problem(heads=4, kv_heads=2, s_q=33, s_k=33),
    "offset": Problem(s_q=21, s_k=50, offset=29),
    "offset_within_a_block": Problem(s_q=5, s_k=90, offset=70, block=32),
    "not_causal": Problem(s_q=40, s_k=27, causal=False),
    "one_row": Problem(s_q=1, s_k=1),
    "block_larger_than_tiles": Problem(block=64, s_q=70, s_k=70),
    "head_dim_padded": Problem(dim=20, v_dim=37),
    "bfloat16": Problem(dtype=torch.bfloat16, block=32, dim=64, v_dim=64),
    "float16": Problem(dtype=torch.float16),
    "bhsd": Problem(format="bhsd", batch=2, s_q=20, s_k=20),
}
CASES_ON_GPUS = {
    f"{name} d{dim} b{block}": Problem(
        heads=8, kv_heads=2, s_q=1000, s_k=1000, dim=dim, v_dim=dim, block=block, batch=2, dtype=dtype
    )
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32))
    for dim in (64, 128)
    for block in (64, 128)
}
ON_GPUS = [pytest.param(problem, id=name, marks=pytest.mark.gpu) for name, problem in CASES_ON_GPUS.items()]
EVERYWHERE = [pytest.param(problem, id=name) for name, problem in CASES.items()] + ON_GPUS


@pytest.fixture(autouse=True)
def poisoned_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's output starts as NaN."""
    monkeypatch.setattr(mass_kernel, "empty", lambda *args: spec.empty(*args).fill_(torch.nan))


def in_torch(statistic: str, problem: Problem, inputs: Inputs, rules: Tensor | None = None) -> Tensor:
    """A statistic in plain torch, products in the inputs' dtype and sums in float32."""
    q, k, v, lse, dout, delta = inputs.cast()
    q, k, v, dout = (to_bhsd(x, problem.format) for x in (q, k, v, dout))
    settings = StatisticSpec(problem.block, problem.dim**-0.5, problem.causal, problem.offset)
    if statistic == "mass":
        return reference_mass(q, k, lse, settings, None)
    views = EffectInputs(q, k, v, lse, dout, delta)
    if statistic == "effects":
        return reference_block_effects(views, settings)
    assert rules is not None
    rules = rules.expand(problem.heads, -1, -1, -1)
    return reference_rule_effects(views, rules, settings)


def rounded(inputs: Inputs) -> list[tuple[Tensor, ...]]:
    """Three times the arguments in float64, each moved by two units in float32's last place, up or down."""
    arguments = inputs.cast(torch.float64)
    return [tuple(x * (1 + (4 * torch.randint_like(x, 2) - 2) * 2**-23) for x in arguments) for _ in range(3)]


def assert_as_exact(name: str, x: Tensor, exact: Tensor, plain: Tensor, moved: list[Tensor], scale: Tensor) -> None:
    """Error at most twice that of plain torch in the inputs' dtype, or that of exact results from rounded arguments.

    The second bound is the problem's own sensitivity: h / (1 - p) magnifies a row's rounding where p is near 1, and
    plain torch's error in one draw is then no measure of the kernel's. Both are relative to `scale`. Of a few numbers,
    both may be below what float32 can hold: rounding a result to it is always allowed.
    """
    norm = scale.norm() + 1e-30
    error, *allowed = ((y.double() - exact).norm() / norm for y in (x, plain, *moved))
    allowed.append(torch.full_like(error, torch.finfo(torch.float32).eps / 2))
    assert error <= 2 * max(allowed), f"{name}: relative error {error:.1e}, allowed twice {max(allowed):.1e}"


def defined_mass(problem: Problem, inputs: Inputs) -> Tensor:
    """The mean, spelled out over explicit probabilities."""
    a = problem.probabilities(inputs)
    _, n_q, n_k = problem.blocks
    mass = torch.stack(
        [
            torch.stack(
                [
                    a[:, :, problem.rows(i), j * problem.block : (j + 1) * problem.block].sum(-1).mean(-1)
                    for j in range(n_k)
                ],
                -1,
            )
            for i in range(n_q)
        ],
        -2,
    )
    return mass.unflatten(1, (problem.kv_heads, -1)).mean(2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", EVERYWHERE)
def test_mass_is_the_mean_probability_of_a_block_pair(problem: Problem, backend: str, device: torch.device) -> None:
    inputs = problem.make(device)
    q, k, _, lse, _, _ = inputs.cast()
    mass = block_mass(q, k, lse, **problem.options, backend=backend)
    plain = in_torch("mass", problem, inputs)
    assert mass.dtype == torch.float32
    exact = defined_mass(problem, inputs)
    moved = [block_mass(q, k, lse, **problem.options, backend="torch") for q, k, _, lse, _, _ in rounded(inputs)]
    assert_as_exact("mass", mass, exact, plain, moved, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "problem",
    [
        pytest.param(Problem(batch=2, s_q=33, s_k=33), id="batch"),
        pytest.param(Problem(s_q=21, s_k=50, offset=29), id="offset"),
        pytest.param(Problem(block=64, s_q=20, s_k=90, offset=70), id="block_larger_than_tiles"),
        *ON_GPUS[::2],
    ],
)
def test_listed_blocks_have_the_mass_that_they_have_among_all(
    problem: Problem, backend: str, device: torch.device
) -> None:
    inputs = problem.make(device)
    q, k, _, lse, _, _ = inputs.cast()
    first, n_q, n_k = problem.blocks
    indices = torch.randint(-1, n_k, (problem.batch, problem.kv_heads, first + n_q, 4), device=device)
    indices[..., 3] = indices[..., 1]  # a second mention
    layout = TopKLayout.from_indices(indices, problem.block, num_heads=problem.heads, num_key_blocks=n_k)
    mass = block_mass(q, k, lse, layout=layout, **problem.options, backend=backend)
    every = block_mass(q, k, lse, **problem.options, backend=backend)
    mine = indices[:, :, first:]
    repeated = torch.stack([(mine[..., :s] == mine[..., s : s + 1]).any(-1) for s in range(4)], -1)
    expected = every.gather(-1, mine.clamp(min=0)).masked_fill((mine < 0) | repeated, 0)
    torch.testing.assert_close(mass, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masses_of_a_query_block_sum_to_one_and_later_blocks_have_none(backend: str, device: torch.device) -> None:
    problem = Problem()
    q, k, _, lse, _, _ = problem.make(device).cast()
    mass = block_mass(q, k, lse, **problem.options, backend=backend)
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]))
    assert not mass.triu(1).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_keys_count_as_rows_with_no_probability(backend: str, device: torch.device) -> None:
    problem = Problem(s_q=32, s_k=32)
    q, k, _, lse, _, _ = problem.make(device).cast()
    lse = lse.clone()
    lse[:, :, :4] = -torch.inf
    total = block_mass(q, k, lse, **problem.options, backend=backend).sum(-1)
    torch.testing.assert_close(total, torch.tensor([0.75, 1.0], device=device).expand_as(total))


@pytest.mark.parametrize("backend", BACKENDS)
def test_later_tokens_change_no_earlier_block(backend: str, device: torch.device) -> None:
    problem = Problem(s_q=48, s_k=48)
    inputs = problem.make(device)
    q, k, v, lse, dout, delta = inputs.cast()
    changed = [x.clone() for x in (q, k, v, dout)]
    for x in changed:
        x[16:] = torch.randn_like(x[16:])
    mass = [block_mass(*x, lse, **problem.options, backend=backend)[..., 0, :] for x in ((q, k), changed[:2])]
    assert mass[0].equal(mass[1])
    effects = [
        block_effects(*x[:3], lse, x[3], delta, **problem.options, backend=backend)[:, :, 0]
        for x in ((q, k, v, dout), changed)
    ]
    assert effects[0].equal(effects[1])


def test_mass_has_no_gradient(device: torch.device) -> None:
    problem = Problem(s_q=20, s_k=20)
    q, k, _, lse, _, _ = (x.requires_grad_() for x in problem.make(device).cast())
    assert not block_mass(q, k, lse, **problem.options).requires_grad


def without(problem: Problem, inputs: Inputs, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Change of dout . out, exact for a linear loss, and the probability gone, where only `keep` is attended to.

    Both are [b, H, s_q]; `keep` is a bool mask [H, n_q, n_k] of all query blocks from position 0.
    """
    q, k, v, dout = (x.double() for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    out, lse = problem.attend(keep, q, k, v)
    after = output_delta(out, dout, format=problem.format)
    return after - inputs.delta, 1 - (lse - inputs.lse).exp().nan_to_num(0)


def sums(problem: Problem, effect: Tensor, p: Tensor) -> Tensor:
    """[4, H, n_q] of [b, H, s_q]."""
    values = torch.stack([effect, effect.abs(), effect.square(), p]).sum(1)
    return torch.stack([values[:, :, problem.rows(i)].sum(-1) for i in range(problem.blocks[1])], -1)


@pytest.mark.parametrize("problem", CASES.values(), ids=CASES.keys())
def test_effects_are_what_masking_the_block_changes(problem: Problem, device: torch.device) -> None:
    inputs = problem.make(device)
    first, n_q, n_k = problem.blocks
    expected = torch.zeros(4, problem.heads, n_q, n_k, dtype=torch.float64, device=device)
    for j in range(n_k):
        keep = torch.ones(problem.heads, first + n_q, n_k, dtype=torch.bool, device=device)
        keep[:, :, j] = False
        effect, p = without(problem, inputs, keep)
        effect = effect.masked_fill(p == 1, 0)  # no other key: it can't be masked
        expected[..., j] = sums(problem, effect, p)
    found = block_effects(*inputs.cast(torch.float64), **problem.options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("problem", CASES.values(), ids=CASES.keys())
def test_rules_cost_what_masking_all_that_they_drop_changes(problem: Problem, device: torch.device) -> None:
    inputs = problem.make(device)
    first, n_q, n_k = problem.blocks
    rules = torch.rand(problem.heads, 5, n_q, n_k, device=device) < 0.5
    found = rule_effects(*inputs.cast(torch.float64), rules, **problem.options)
    for r in range(rules.shape[1]):
        keep = torch.ones(problem.heads, first + n_q, n_k, dtype=torch.bool, device=device)
        keep[:, first:] = rules[:, r]
        expected = sums(problem, *without(problem, inputs, keep))
        torch.testing.assert_close(found[:, :, r], expected, rtol=1e-9, atol=1e-9)


def assert_sums_as_exact(x: Tensor, exact: Tensor, plain: Tensor, moved: list[Tensor]) -> None:
    # a square doubles relative errors
    x, exact, plain, *moved = (torch.stack([y[0], y[1], y[2].sqrt(), y[3]]) for y in (x, exact, plain, *moved))
    # signed sums cancel: their error is relative to the sum of |E|
    scales = (exact[1], exact[1], exact[2], exact[3])
    for i, name in enumerate(("signed", "absolute", "root of squared", "mass")):
        assert_as_exact(name, x[i], exact[i], plain[i], [y[i] for y in moved], scales[i])


@pytest.mark.parametrize(
    "problem",
    [
        *EVERYWHERE,
        pytest.param(Problem(sharpness=6), id="sharp"),
        pytest.param(Problem(sharpness=6, block=32, dtype=torch.bfloat16), id="sharp_bfloat16"),
    ],
)
def test_kernels_of_effects_are_as_exact_as_torch(problem: Problem, device: torch.device) -> None:
    inputs = problem.make(device)
    _, n_q, n_k = problem.blocks
    arguments, exact, moved = inputs.cast(), inputs.cast(torch.float64), rounded(inputs)
    assert_sums_as_exact(
        block_effects(*arguments, **problem.options, backend="triton"),
        block_effects(*exact, **problem.options, backend="torch"),
        in_torch("effects", problem, inputs),
        [block_effects(*x, **problem.options, backend="torch") for x in moved],
    )
    rules = torch.rand(1, 3, n_q, n_k, device=device) < 0.6
    assert_sums_as_exact(
        rule_effects(*arguments, rules, **problem.options, backend="triton"),
        rule_effects(*exact, rules, **problem.options, backend="torch"),
        in_torch("rules", problem, inputs, rules),
        [rule_effects(*x, rules, **problem.options, backend="torch") for x in moved],
    )


def test_a_block_with_nearly_all_probability_has_an_exact_effect_in_float32(device: torch.device) -> None:
    problem = Problem(heads=1, s_q=1, s_k=32, offset=31, causal=False, dim=16)
    inputs = problem.make(device)
    inputs.q[:] = 1.0
    inputs.k[:16] = 5.0  # of 1 - p some 1e-9 is left: less than float32 holds beside 1
    q, k, v, dout = (x.double() for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    out, lse = problem.attend(torch.ones(1, 2, 2, dtype=torch.bool, device=device), q, k, v)
    inputs = Inputs(inputs.q, inputs.k, inputs.v, lse, inputs.dout, output_delta(out, dout))
    keep = torch.tensor([[[False, True]] * 2], device=device)
    effect, p = without(problem, inputs, keep)
    assert 1 - 1e-6 < p < 1
    for backend in BACKENDS:
        found = block_effects(*inputs.cast(), **problem.options, backend=backend)[0, 0, 0, 0]
        torch.testing.assert_close(found.double(), effect.squeeze(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_add_up_over_sequences_and_calls(backend: str, device: torch.device) -> None:
    problem = Problem(batch=2, s_q=20, s_k=20, format="bhsd")
    arguments = problem.make(device).cast()
    rules = torch.rand(2, 3, 2, 2, device=device) < 0.5
    together = block_effects(*arguments, **problem.options, backend=backend)
    of_rules = rule_effects(*arguments, rules, **problem.options, backend=backend)
    total = rule_total = None
    for i in range(2):
        one = [x[i : i + 1] for x in arguments]
        total = block_effects(*one, **problem.options, out=total, backend=backend)
        rule_total = rule_effects(*one, rules, **problem.options, out=rule_total, backend=backend)
    torch.testing.assert_close(total, together)
    torch.testing.assert_close(rule_total, of_rules)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rule_that_keeps_all_costs_nothing_and_one_that_drops_all_leaves_output_zero(
    backend: str, device: torch.device
) -> None:
    problem = Problem(s_q=20, s_k=20)
    inputs = problem.make(device)
    rules = torch.ones(1, 2, 2, 2, dtype=torch.bool, device=device)
    rules[:, 1] = False
    found = rule_effects(*inputs.cast(), rules, **problem.options, backend=backend)
    assert not found[:, :, 0].any()
    expected = sums(problem, -inputs.delta, torch.ones_like(inputs.delta))
    torch.testing.assert_close(found[:, :, 1].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("problem", ON_GPUS)
def test_statistics_are_bitwise_the_same_in_every_run(problem: Problem, device: torch.device) -> None:
    q, k, v, lse, dout, delta = problem.make(device).cast()
    _, n_q, n_k = problem.blocks
    rules = torch.rand(1, 9, n_q, n_k, device=device) < 0.6
    for once in (
        lambda: block_mass(q, k, lse, **problem.options),
        lambda: block_effects(q, k, v, lse, dout, delta, **problem.options),
        lambda: rule_effects(q, k, v, lse, dout, delta, rules, **problem.options),
    ):
        assert once().equal(once())


def test_arguments_that_do_not_fit_are_rejected(device: torch.device) -> None:
    problem = Problem(s_q=20, s_k=20)
    q, k, v, lse, dout, delta = problem.make(device).cast()
    options = problem.options
    with pytest.raises(ValueError, match=r"lse must be torch.float32 \[1, 2, 20\]"):
        block_mass(q, k, lse[..., :-1], **options)
    with pytest.raises(ValueError, match="block"):
        block_mass(q, k, lse, **options | {"block_size": 17})
    with pytest.raises(ValueError, match="query_offset"):
        block_mass(q, k, lse, **options | {"query_offset": -1})
    of_heads = TopKLayout.from_indices(torch.zeros(1, 2, 2, 1, dtype=torch.int32, device=device), 16, num_heads=2)
    with pytest.raises(ValueError, match="give each KV head a list"):
        block_mass(q, k, lse, layout=of_heads, **options)
    of_kv_heads = TopKLayout.from_indices(of_heads.indices[:, :1], 16, num_heads=2)
    with pytest.raises(ValueError, match="too small"):
        block_mass(q, k, lse, layout=of_kv_heads, **options | {"query_offset": 20})
    with pytest.raises(ValueError, match="dout"):
        block_effects(q, k, v, lse, dout[..., :8], delta, **options)
    with pytest.raises(ValueError, match="out must be"):
        block_effects(q, k, v, lse, dout, delta, out=torch.zeros(4, 2, 2, 3, device=device), **options)
    with pytest.raises(ValueError, match="rules must be"):
        rule_effects(q, k, v, lse, dout, delta, torch.ones(2, 1, 2, 3, dtype=torch.bool, device=device), **options)
