"""A call like an earlier one: its launches differ in addresses alone, and what else differs is checked again."""

import gc
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from s2train.kernels import BlockLayout, block_sparse_attention, launch
from s2train.kernels.call import keep
from s2train.kernels.hopper import backward, forward, repeated, support
from torch import Tensor
from triton.backends.nvidia import driver as nvidia
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

HEADS, LENGTH, DIM, BLOCK = 2, 256, 64, 64
TENSORS = ("pattern_of_head", "row_offsets", "row_columns", "column_offsets", "column_rows")
without_gpu = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="stands in for a GPU's driver")
Recorded = list[tuple[Any, ...]]


class Launcher:
    """Stands in for a launcher that Triton has compiled for a kernel."""

    def __init__(self, launches: Recorded) -> None:
        self.launches = launches

    def __call__(self, *arguments: Any) -> None:
        self.launches.append(arguments)


class Compiled:
    """A compiled kernel behind Triton's launcher, whose own compiled launcher notes its arguments."""

    function, packed_metadata = 7, (4, 1, 0)

    def __init__(self, arguments: tuple[Any, ...], launches: Recorded) -> None:
        descriptors = [x for x in arguments if isinstance(x, TensorDescriptor)]
        maps = [
            {"swizzle": 3, "elem_size": x.base.element_size(), "elem_type": 8 + i % 3, "block_size": x.block_shape,
             "fp4_padded": False}
            for i, x in enumerate(descriptors)
        ]  # fmt: skip
        self.metadata = SimpleNamespace(tensordesc_meta=maps)
        signature = dict(enumerate("tensordesc" if isinstance(x, TensorDescriptor) else "i32" for x in arguments))
        self.run = object.__new__(nvidia.CudaLauncher)
        self.run.launch = nvidia.wrap_handle_tensordesc(Launcher(launches), signature, maps)
        self.run.launch_cooperative_grid = self.run.launch_pdl = self.run.gsan_enabled = False
        self.run.global_scratch_size = self.run.profile_scratch_size = 0
        self.run.global_scratch_align = self.run.profile_scratch_align = 1
        self.run.arg_annotations = self.run.kernel_signature = "as annotated"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Launches of Hopper's kernels, which compute nothing here."""
    recorded: Recorded = []

    def encode(*arguments: Any) -> tuple[Any, ...]:
        return tuple(tuple(x) if isinstance(x, list) else x for x in arguments)

    utils = SimpleNamespace(fill_tma_descriptor=encode, fill_tma_descriptor_tiled=encode)
    driver = SimpleNamespace(active=SimpleNamespace(utils=utils, get_current_stream=lambda index: 5))
    monkeypatch.setattr(triton.runtime, "driver", driver)
    monkeypatch.setattr(repeated, "driver", driver)

    def stand_in(kernel: Any, grid: Any, arguments: tuple[Any, ...], *, cache: Any, key: Any, **_: Any) -> Compiled:
        compiled: Compiled = cache.setdefault(key, Compiled(arguments, recorded))
        nothing = (None, None, None)
        compiled.run(*grid, 5, compiled.function, compiled.packed_metadata, *nothing, *arguments)
        return compiled

    for module in (forward, backward):
        monkeypatch.setattr(module, "launch", stand_in)
    monkeypatch.setattr(support, "is_hopper", lambda device: True)
    return recorded


def tensors(heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    shape = (LENGTH, 1, heads, DIM)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    return q, k, v


def layout() -> BlockLayout:
    blocks = LENGTH // BLOCK
    return BlockLayout.from_mask(torch.rand(HEADS, blocks, blocks) < 0.7, BLOCK)


def flat(recorded: Recorded) -> list[list[Any]]:
    """Numbers and addresses that compiled launchers got, with each address as the number of its first appearance."""
    seen: dict[int, int] = {}

    def plain(x: Any) -> Iterator[Any]:
        if isinstance(x, tuple | list):
            for y in x:
                yield from plain(y)
        elif isinstance(x, Tensor) or (isinstance(x, int) and x > 2**32):
            yield "address", seen.setdefault(x.data_ptr() if isinstance(x, Tensor) else x, len(seen))
        else:
            yield x

    return [list(plain(x)) for x in recorded]


def addresses(recorded: Any) -> set[int]:
    if isinstance(recorded, tuple | list):
        return set().union(*(addresses(x) for x in recorded))
    return {recorded} if isinstance(recorded, int) and recorded > 2**32 else set()


def step(kept: BlockLayout, with_lse: bool = False, **options: Any) -> tuple[Tensor, ...]:
    """Return inputs, output and gradients of one call on new tensors."""
    leaves = tensors()
    out, lse = block_sparse_attention(*leaves, kept, return_lse=True, backend="triton", **options)
    gradients = torch.randn_like(out), torch.randn_like(lse)
    outs = (out, lse) if with_lse else (out,)
    return *leaves, out, *torch.autograd.grad(outs, leaves, gradients[: len(outs)])


def came_the_short_way(recorded: Recorded) -> bool:
    """Whether launchers got addresses for tensors."""
    return not any(isinstance(x, Tensor) for one in flat_tuple(recorded) for x in one)


def flat_tuple(recorded: Recorded) -> list[tuple[Any, ...]]:
    return [(*one, *one[-1]) if isinstance(one[-1], tuple | list) else one for one in recorded]


@without_gpu
@pytest.mark.parametrize(
    "options", [{}, {"with_lse": True, "format": "bshd"}, {"causal": False, "softmax_scale": 0.3}], ids=str
)
def test_launches_are_repeated_but_for_addresses(options: dict[str, Any], launches: Recorded) -> None:
    kept = layout()
    step(kept, **options)
    first = launches.copy()
    launches.clear()
    before = step(kept, **options)
    assert not came_the_short_way(launches)
    launches.clear()
    after = step(kept, **options)
    assert came_the_short_way(launches)
    assert len(launches) == 4
    assert flat(launches) == flat(first)
    used = addresses(launches)
    assert used >= {x.data_ptr() for x in after}
    assert not used & {x.data_ptr() for x in before}


@without_gpu
@pytest.mark.parametrize(
    "gradient",
    [
        lambda out: torch.ones((), dtype=out.dtype).expand_as(out),  # out.sum()
        lambda out: torch.randn_like(out.transpose(2, 3).contiguous()).transpose(2, 3),
        lambda out: torch.randn_like(out[:1]).expand_as(out),
        lambda out: torch.randn(out.numel() + 1, dtype=out.dtype)[1:].view_as(out),
    ],
    ids=["of a sum", "transposed", "expanded", "not aligned"],
)
def test_gradients_that_kernels_cannot_read_are_copied(
    gradient: Callable[[Tensor], Tensor], launches: Recorded
) -> None:
    kept = layout()
    for _ in range(3):
        leaves = tensors()
        out = block_sparse_attention(*leaves, kept, backend="triton")
        dout = gradient(out)
        launches.clear()
        torch.autograd.grad(out, leaves, dout)
        tensors_given = [x for one in flat_tuple(launches) for x in one if isinstance(x, Tensor)]
        assert len(launches) == 3
        assert dout.data_ptr() not in addresses(launches) | {x.data_ptr() for x in tensors_given}


@without_gpu
def test_a_saved_tensor_of_another_dtype_is_rejected_before_a_repeated_launch(launches: Recorded) -> None:
    kept = layout()
    for _ in range(3):
        step(kept)
    launches.clear()
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.float()),
        pytest.raises(ValueError, match=r"returned .* torch\.float32"),
    ):
        step(kept)
    assert len(launches) == 1  # the forward


@without_gpu
@pytest.mark.parametrize("is_cut", [False, True])
def test_kernels_get_an_integer_scale_as_any_other(is_cut: bool, launches: Recorded) -> None:
    blocks = 64
    mask = torch.eye(blocks) > 0
    masks = [mask | (torch.arange(blocks) % 9 == head) & (torch.arange(blocks) > 0) for head in range(4)]
    masks = [of_head | is_cut & (torch.arange(blocks) == 0) for of_head in masks]
    types = []
    for scale in (1, 0.125):
        q = torch.randn(blocks * BLOCK, 1, 4, DIM, dtype=torch.bfloat16).requires_grad_()
        k, v = (torch.randn_like(q[:, :, :1]) for _ in range(2))
        kept = BlockLayout.from_mask(torch.stack(masks), BLOCK)
        launches.clear()
        block_sparse_attention(q, k, v, kept, softmax_scale=scale, backend="triton").sum().backward()
        assert len(launches) == 5  # the last one adds sums of dk and dv
        types.append([type(x) for one in flat_tuple(launches) for x in one])
    assert types[0] == types[1]


@without_gpu
def test_a_profiler_sees_launches_of_repeated_calls(launches: Recorded) -> None:
    kept = layout()
    for _ in range(2):
        step(kept)
    launches.clear()
    watch = lambda metadata: None  # noqa: E731
    launch.knobs.runtime.launch_enter_hook.add(watch)
    try:
        step(kept)
    finally:
        launch.knobs.runtime.launch_enter_hook.remove(watch)
    assert len(launches) == 4
    assert not came_the_short_way(launches)


@without_gpu
def test_no_launch_is_prepared_for_calls_that_are_not_found_again(
    launches: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "RepeatedForward", None)
    monkeypatch.setattr(backward, "RepeatedBackward", None)
    kept = layout()
    for _ in range(3):
        step(kept, cu_seqlens=torch.tensor([0, 100, LENGTH], dtype=torch.int32))
    step(kept)
    assert len(launches) == 16


@without_gpu
def test_a_layout_is_freed_with_its_last_reference(launches: Recorded) -> None:
    kept = layout()
    for _ in range(3):
        step(kept)
    alive = weakref.ref(kept)
    gc.disable()
    try:
        launches.clear()
        del kept
        assert alive() is None
    finally:
        gc.enable()


def test_few_sorts_of_calls_are_kept() -> None:
    kept = layout()
    q, k, v = (x.detach() for x in tensors())
    for length in range(1, 30):
        block_sparse_attention(q[:length], k, v, kept, backend="torch")
    assert len(kept.calls) < 10


def test_threads_may_keep_calls_at_the_same_time() -> None:
    kept: dict[int, str] = dict.fromkeys(range(20), "call")

    def another_thread(frame: Any, event: str, function: Any) -> None:
        if event == "c_return" and function is iter:
            kept[len(kept)] = "its call"

    sys.setprofile(another_thread)
    try:
        keep(kept, -1, "call")
    finally:
        sys.setprofile(None)
    assert list(kept) == [*range(13, 20), -1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda q, k, v: {"k": k.float()}, "cast them"),
        (lambda q, k, v: {"v": v[:100]}, "shapes don't match"),
        (lambda q, k, v: {"q": q.repeat(2, 1, 1, 1)}, "too small"),
        (lambda q, k, v: {"query_offset": 1}, "too small"),
        (lambda q, k, v: {"softmax_scale": -1.0}, "softmax_scale"),
        (lambda q, k, v: {"format": "bhsd"}, "heads"),
        (lambda q, k, v: {"backend": "cuda"}, "backend must be"),
    ],
)
def test_bad_arguments_are_rejected_after_good_ones(changed: Callable[..., dict[str, Any]], message: str) -> None:
    q, k, v = (x.detach() for x in tensors())
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "layout": layout(), "backend": "torch"}
    block_sparse_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**arguments | changed(q, k, v))


@pytest.mark.parametrize(
    "changed",
    [
        lambda q, k, v: {"causal": False},
        lambda q, k, v: {"softmax_scale": 0.5},
        lambda q, k, v: {"q": q[:100], "query_offset": 100},
        lambda q, k, v: {"q": q[:100]},
        lambda q, k, v: {"k": k[:100], "v": v[:100]},
        lambda q, k, v: {"cu_seqlens": torch.tensor([0, 100, LENGTH], dtype=torch.int32)},
        lambda q, k, v: {name: x.double() for name, x in (("q", q), ("k", k), ("v", v))},
    ],
)
def test_another_sort_of_call_has_results_of_its_own(changed: Callable[..., dict[str, Any]]) -> None:
    q, k, v = (x.detach() for x in tensors())
    used = layout()
    fresh = BlockLayout.from_mask(used.mask(), BLOCK)
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "backend": "torch"}
    before = block_sparse_attention(**arguments, layout=used)
    arguments |= changed(q, k, v)
    expected = block_sparse_attention(**arguments, layout=fresh)
    assert block_sparse_attention(**arguments, layout=used).equal(expected)
    assert not expected.equal(before)


def test_a_layout_with_other_fields_has_results_of_its_own() -> None:
    q, k, v = (x.detach() for x in tensors())
    one, other = layout(), layout()
    before = block_sparse_attention(q, k, v, one)
    changed = replace(one, **{name: getattr(other, name) for name in TENSORS})
    expected = block_sparse_attention(q, k, v, other)
    assert block_sparse_attention(q, k, v, changed).equal(expected)
    assert not expected.equal(before)


@pytest.mark.gpu
@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("format", ["sbhd", "bhsd"])
def test_repeated_calls_are_exact_on_a_gpu(format: str, expanded: bool) -> None:
    kept = layout().to("cuda")

    def results(kept: BlockLayout, *inputs: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (x.detach().requires_grad_() for x in inputs)
        out, lse = block_sparse_attention(q, k, v, kept, return_lse=True, format=format)  # type: ignore[call-overload]
        dout, dlse = (x.new_ones(() if expanded else x.shape).expand_as(x) for x in (out, lse))
        return out, lse, *torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))

    shape = (LENGTH, 1, HEADS, DIM) if format == "sbhd" else (1, HEADS, LENGTH, DIM)
    for moved in (0, 0, 0, 0, 1, 0):  # by elements: an address that is not aligned, and aligned ones again
        inputs = [torch.randn(LENGTH * HEADS * DIM + 1, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        inputs = [x[moved : moved + LENGTH * HEADS * DIM].view(shape) for x in inputs]
        expected = results(BlockLayout.from_mask(kept.mask(), BLOCK), *inputs)
        for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), results(kept, *inputs), expected, strict=True):
            torch.testing.assert_close(x, y, msg=name, rtol=0, atol=1e-2 if name == "dq" else 0)


@pytest.mark.gpu
def test_a_call_on_another_stream_is_launched_there() -> None:
    kept, side = layout().to("cuda"), torch.cuda.Stream()
    q, k, v = (x.detach().to("cuda") for x in tensors())
    expected, _, _ = (block_sparse_attention(q, k, v, kept) for _ in range(3))
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        q2 = q + 0  # after the sleep
        out = block_sparse_attention(q2, k, v, kept)
    side.synchronize()
    assert out.equal(expected)


@without_gpu
def test_forward_mode_is_rejected_with_and_without_gradients() -> None:
    q, k, v = (x[:64].detach().float() for x in tensors())
    kept = layout()
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
            with pytest.raises(RuntimeError, match="jvp"):
                block_sparse_attention(dual, k, v, kept, backend="portable")


@without_gpu
def test_second_derivatives_are_rejected() -> None:
    q, k, v = (x[:64].detach().float().requires_grad_() for x in tensors())
    out = block_sparse_attention(q, k, v, layout(), backend="portable")
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dq.sum().backward()
