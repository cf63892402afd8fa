"""Liger-Kernel's kernels, in Triton's interpreter, are Megatron's in output and gradients."""

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from s2train.kernels.interpreter import repair_interpreter
from s2train.kernels.verified import VERIFIED
from torch import Tensor

from s2train.config import PretrainConfig
from s2train.environment import liger
from s2train.environment.liger import choose_loss, kernels_line, liger_operations
from tests.megatron.interpreted_liger import repair_liger
from tests.program import results_of
from tests.validation.test_rejections import config

HOPPER = (9, 0)
repair_interpreter()  # Liger-Kernel's loops need it too
needs_liger = pytest.mark.skipif(liger.liger_problem() is not None, reason=str(liger.liger_problem()))
if liger.liger_problem() is None:
    repair_liger()


def results(function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> list[Tensor]:
    """Outputs, and gradients of a random weighting of them, the same for every function."""
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    found = function(*(x.clone() if x.is_floating_point() else x for x in leaves))
    outs = (found,) if isinstance(found, Tensor) else found
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator) for out in outs]
    kept = [out.detach().clone() for out in outs]
    total = sum(((out * weight).sum() for out, weight in zip(outs, weights, strict=True)), torch.zeros(()))
    return [*kept, *torch.autograd.grad(total, [x for x in leaves if x.is_floating_point()])]


def assert_alike(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        assert (x - y).norm() <= 2e-6 * y.norm()


@needs_liger
@pytest.mark.parametrize(
    "x", [torch.randn(5, 2, 48), torch.randn(2, 5, 48).transpose(0, 1)], ids=["contiguous", "strided"]
)
def test_swiglu_is_torchs(x: Tensor) -> None:
    from s2train.megatron.fused import swiglu

    def plain(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    assert_alike(results(swiglu, x), results(plain, x))


@needs_liger
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swiglu_is_ligers_bit_for_bit(dtype: torch.dtype) -> None:
    from s2train.megatron.fused import swiglu, swiglu_launched_by_liger

    x = torch.randn(5, 2, 48, dtype=dtype)
    for ours, theirs in zip(results(swiglu, x), results(swiglu_launched_by_liger, x), strict=True):
        assert ours.equal(theirs)


@needs_liger
def test_swiglu_becomes_its_gradient_once() -> None:
    from s2train.megatron.fused import swiglu

    x = torch.randn(5, 2, 48, requires_grad=True)
    out = swiglu(x)
    (gradient,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    assert gradient.data_ptr() == x.data_ptr()
    assert not gradient.requires_grad
    with pytest.raises(RuntimeError, match="run once"):
        out.sum().backward()


@needs_liger
def test_another_release_launches_its_own_swiglu(monkeypatch: pytest.MonkeyPatch) -> None:
    from s2train.megatron import fused

    x = torch.randn(5, 2, 48)
    expected = results(fused.swiglu, x)
    monkeypatch.setattr(fused, "installed_version", lambda _: "9.9")
    assert all(found.equal(one) for found, one in zip(results(fused.swiglu, x), expected, strict=True))
    view = fused.swiglu(x.requires_grad_()).grad_fn
    assert view is not None
    assert "Liger" in view.next_functions[0][0].name()


def plain_sum_and_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, 1e-5), total


@needs_liger
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kept", "leaves"),
    [(slice(2), 3), (slice(1), 3), (slice(1, 2), 2), (slice(2), 2)],
    ids=["norm and sum", "norm alone", "sum alone", "frozen weight"],
)
def test_a_sum_with_its_norm_is_as_near_the_exact_one_as_torchs(kept: slice, leaves: int, dtype: torch.dtype) -> None:
    from s2train.megatron.summed_norm import sum_and_norm

    inputs = [torch.randn(5, 2, 24).to(dtype), torch.randn(5, 2, 24).to(dtype), torch.randn(24).to(dtype)]

    def of(function: Callable[..., tuple[Tensor, ...]], as_dtype: torch.dtype) -> list[Tensor]:
        cast = [x.to(as_dtype) for x in inputs]
        return results(lambda *given: function(*given, *cast[leaves:])[kept], *cast[:leaves])

    exact = of(plain_sum_and_norm, torch.float64)
    found, plain = of(lambda x, r, w: sum_and_norm(x, r, w, 1e-5), dtype), of(plain_sum_and_norm, dtype)
    for ours, theirs, true in zip(found, plain, exact, strict=True):
        assert (ours - true).norm() <= 2 * (theirs - true).norm() + 3e-7 * true.norm()


@needs_liger
def test_a_norm_takes_the_sum_that_it_made_once_and_only_in_training() -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from s2train.megatron.summed_norm import SummingRMSNorm

    norm = SummingRMSNorm(TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1), 8)
    x, other = torch.randn(2, 3, 1, 8)
    total, of_weights = norm(x, other), [norm.weight.detach().clone()]
    with torch.no_grad():
        of_weights.append(norm.weight.mul_(2).clone())
    expected = [F.rms_norm(x + other, (8,), weight, 1e-5) for weight in of_weights]
    assert_alike([norm(total), norm(total)], expected)
    norm(x, other)
    with pytest.raises(AssertionError, match="not what this norm gets"):
        norm(other)
    norm(x, other)  # and the pass fails
    assert_alike([norm.eval()(x + other)], expected[1:])


@needs_liger
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "turning", "own_angles"),
    [(1, 4, 2, 8, False), (2, 4, 1, 8, False), (2, 2, 2, 8, True), (1, 4, 2, 4, False)],
    ids=["grouped heads", "two sequences", "a position for each sequence", "half of the dimensions"],
)
def test_rotation_is_megatrons(batch: int, heads: int, kv_heads: int, turning: int, own_angles: bool) -> None:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    from s2train.megatron.rotation import Rotation

    length, dim, group = 6, 8, heads // kv_heads
    half = 6 * torch.rand(length, batch if own_angles else 1, 1, turning // 2)
    angles, rotation = torch.cat((half, half), -1), Rotation()

    def split(projected: Tensor) -> tuple[Tensor, Tensor]:
        """As Megatron does: the key a view of the projection."""
        query, key, _ = projected.split([group * dim, dim, dim], dim=3)
        return query.reshape(length, batch, heads, dim), key

    def ours(projected: Tensor) -> tuple[Tensor, Tensor]:
        return rotation(*split(projected), angles)

    def theirs(projected: Tensor) -> tuple[Tensor, ...]:
        return tuple(_apply_rotary_pos_emb_bshd(x, angles) for x in split(projected))

    projected = torch.randn(length, batch, kv_heads, (group + 2) * dim)
    found = results(ours, projected)
    assert_alike(found, results(theirs, projected))
    assert (found[0] - split(projected)[0]).norm() > 0.1  # it did turn


@needs_liger
def test_rotation_follows_angles_that_change() -> None:
    from s2train.megatron.rotation import Rotation

    rotation, query = Rotation(), torch.randn(3, 1, 2, 4)
    angles = [torch.full((3, 1, 1, 4), angle) for angle in (0.0, 1.0, 0.0)]
    turned = [rotation(query.clone(), query.clone(), each)[0] for each in angles]
    assert turned[0].equal(turned[2])
    assert not turned[0].equal(turned[1])


@needs_liger
def test_losses_are_torchs() -> None:
    from s2train.megatron.in_place_loss import loss_in_place
    from s2train.megatron.liger_losses import linear_loss, vocab_parallel_loss

    hidden, weight, labels = torch.randn(7, 2, 16), torch.randn(40, 16), torch.randint(40, (7, 2))

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)

    def over_logits(hidden: Tensor, weight: Tensor) -> Tensor:
        return vocab_parallel_loss(hidden @ weight.T, labels, None)

    def in_place(hidden: Tensor, weight: Tensor) -> Tensor:
        return loss_in_place(hidden @ weight.T, labels)

    expected = results(plain, hidden, weight)
    assert_alike(results(over_logits, hidden, weight), expected)
    assert_alike(results(in_place, hidden, weight), expected)
    assert_alike(results(lambda x, w: linear_loss(x, w, labels), hidden, weight), expected)


@needs_liger
def test_a_loss_in_place_rounds_gradients_alone_and_only_where_they_are_wanted() -> None:
    from s2train.megatron.in_place_loss import loss_in_place

    rows = (33, 4)  # errors of so many are 1.27 ± 0.06 times those of rounding once; of 14 rows they vary too much
    logits, labels, dlosses = torch.randn(*rows, 40).bfloat16(), torch.randint(40, rows), torch.rand(rows)
    kept = logits.clone()
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="none").view(rows)
    (gradient,) = torch.autograd.grad(expected, exact, dlosses.double())
    found = loss_in_place(logits, labels)
    assert logits.equal(kept)
    assert (found - expected).norm() <= 2e-6 * expected.norm()
    (ours,) = torch.autograd.grad(loss_in_place(logits.requires_grad_(), labels), logits, dlosses)
    rounded = gradient.bfloat16()
    assert (ours - gradient).norm() <= 2 * (rounded - gradient).norm()
    assert ours.data_ptr() == logits.data_ptr()


@needs_liger
@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_a_model_trains_as_with_megatrons_kernels(tp: int) -> None:
    seed = str(random.randrange(2**31))
    print("seed", seed)
    measured = results_of("tests.megatron.liger_program", seed, str(tp), processes=tp, interpret=True)
    for case, found in measured.items():
        for name, (error, of_megatrons) in found.items():
            assert error < max(1e-5, 2 * of_megatrons), (case, name)


# what a run takes
@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(liger, "installed_version", {entry.library: entry.release for entry in VERIFIED}.get)
    return monkeypatch


def line(capability: tuple[int, int] | None = HOPPER, te: bool = False, **changes: object) -> str:
    return kernels_line(config(**changes), capability, te)


@pytest.mark.usefixtures("installed")
def test_auto_takes_what_was_verified() -> None:
    cfg: PretrainConfig = config()
    verified = {case.removesuffix(" bf16") for entry in VERIFIED for case in entry.cases if case.endswith(" bf16")}
    assert liger_operations(cfg, HOPPER, te=False) == verified & set(liger.OPERATIONS)
    assert choose_loss(cfg, HOPPER, te=False) == ("in_place" if "loss in_place" in verified else "liger")
    assert choose_loss(config(parallel__tp=2), HOPPER, te=False) == "torch"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("capability", "te"), [((8, 0), False), (None, False), (HOPPER, True)])
def test_auto_takes_none_on_other_devices_or_beside_transformer_engine(
    capability: tuple[int, int] | None, te: bool
) -> None:
    assert not liger_operations(config(), capability, te)
    assert choose_loss(config(), capability, te) == "torch"


def test_transformer_engine_keeps_its_own_rotation() -> None:
    assert liger_operations(config(elementwise="liger"), HOPPER, te=True) == {"swiglu"}


def test_the_log_says_what_runs_and_why_not_liger(installed: pytest.MonkeyPatch) -> None:
    assert (
        line(elementwise="liger", loss="linear")
        == "swiglu liger, rotation s2train, split s2train, sums liger, loss linear"
    )
    assert (
        line(elementwise="torch", loss="torch") == "swiglu torch, rotation torch, split torch, sums torch, loss torch"
    )
    assert "swiglu liger" in line()
    apart = line(elementwise="liger", loss="liger", train__recompute="mlp")
    assert "sums torch, loss liger (train.recompute=mlp recomputes norms" in apart
    shared = line(elementwise="liger", loss="liger", parallel__tp=8)
    assert "rotation liger, split torch, sums liger, loss liger (the split needs whole KV heads" in shared
    normalized = line(elementwise="liger", loss="liger", model__qk_norm=True)
    assert "rotation liger, split torch, sums liger, loss liger (the split rotates queries and keys" in normalized
    assert line(None) == ""
    installed.setattr(liger, "installed_version", lambda _: None)
    assert line() == "swiglu torch, rotation torch, split torch, sums torch, loss torch (liger-kernel is not installed)"
    installed.setattr(liger, "installed_version", lambda _: "9.9")
    other = line(elementwise="liger", loss="liger")
    assert "swiglu liger's own launch, " in other
    assert "sums torch, loss liger (sums are those of liger-kernel" in other
    parts = line().split("; ")
    assert "liger-kernel 9.9 was not checked for swiglu bf16 on compute capability 9.0" in parts[0]
    assert "to check: python launch/check_libraries.py" in parts[-1]
    assert all(first != second for first, second in pairwise(parts))


def test_the_log_names_the_kernel_that_was_not_checked_under_a_later_triton(installed: pytest.MonkeyPatch) -> None:
    release = liger.installed_version
    installed.setattr(liger, "installed_version", lambda name: "3.9.0" if name == "triton" else release(name))
    used, _, why = line().partition(" (")
    assert used == "swiglu liger, rotation liger, split torch, sums liger, loss in_place"
    assert why.startswith(
        "triton 3.9.0 was not checked for split bf16 on compute capability 9.0; to check: python launch/"
    )
