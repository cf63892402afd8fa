"""The Hopper forward's schedule, and when the Hopper kernels are chosen. The kernels themselves need a GPU."""

from typing import Any

import pytest
import torch
from s2train.kernels import BlockLayout
from s2train.kernels.hopper import forward_schedule as module
from s2train.kernels.hopper import support as hopper_support
from s2train.kernels.hopper.forward_schedule import TILE, ForwardSchedule, forward_schedule
from s2train.kernels.hopper.support import (
    backward_choice,
    hopper_backward_supported,
    hopper_forward_supported,
    kernel_choice,
)
from s2train.kernels.spec import AttentionSpec
from s2train.kernels.token_mask import token_mask

from tests.kernels.cases import Problem, assert_as_exact_as_torch


def random_layout(block: int, n_q: int, n_k: int, keep: float = 0.4, heads: int = 4) -> BlockLayout:
    return BlockLayout.from_mask(torch.rand(heads, n_q, n_k) < keep, block)


def walked(schedule: ForwardSchedule, layout: BlockLayout, s_k: int, causal: bool) -> torch.Tensor:
    """Bool [H, rows, keys] that the kernel attends to, following the schedule as it does; each pair once."""
    per_step = TILE // schedule.chunk_keys
    rows = schedule.tiles_per_pattern * TILE
    seen = torch.zeros(layout.num_heads, rows, s_k, dtype=torch.bool)
    last_key = torch.full((rows,), s_k - 1)
    if causal:
        last_key = last_key.minimum(torch.arange(rows))
    for head, slot in zip(schedule.head_order.tolist(), schedule.head_slot.tolist(), strict=True):
        for tile in range(schedule.tiles_per_pattern):
            place = slot * schedule.tiles_per_pattern + tile
            begin, end = schedule.step_offsets[place : place + 2].tolist()
            full = int(schedule.full_offsets[place])
            assert begin < full <= end
            for step in range(begin, end):
                for entry in schedule.chunks[step * per_step : (step + 1) * per_step].tolist():
                    first = entry // 4 * schedule.chunk_keys
                    keys = torch.arange(first, first + schedule.chunk_keys)
                    keys = keys[keys < s_k]
                    for half in range(2):
                        row = torch.arange(tile * TILE + half * 64, tile * TILE + half * 64 + 64)
                        part = torch.ones(64, len(keys), dtype=torch.bool)
                        if step < full:
                            part = (keys <= last_key[row, None]) & bool(entry >> half & 1)
                        assert not (seen[head, row[:, None], keys] & part).any()
                        seen[head, row[:, None], keys] |= part
    return seen


@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("s_q", "s_k"), [(512, 512), (330, 330), (150, 450), (450, 150), (1, 1)])
def test_work_covers_exactly_what_the_layout_keeps(block: int, causal: bool, s_q: int, s_k: int) -> None:
    layout = random_layout(block, -(-s_q // block), -(-s_k // block))
    schedule = forward_schedule(layout, causal=causal, query_end=s_q, s_k=s_k)
    expected = token_mask(layout, s_q, s_k, causal=causal)
    assert walked(schedule, layout, s_k, causal)[:, :s_q].equal(expected)


def test_local_and_vertical_pattern_needs_masks_only_near_the_diagonal() -> None:
    i = torch.arange(64)
    keep = ((i[:, None] - i < 16) | ((i + 1) % 16 == 0)) & (i[:, None] >= i)
    schedule = forward_schedule(BlockLayout.from_mask(keep[None], 64), causal=True, query_end=4096, s_k=4096)
    masked = schedule.full_offsets - schedule.step_offsets[:-1]
    assert masked.max() <= 2
    # the union of two blocks' chunks is at most one longer than either, and padded to pairs
    kept = keep.sum(1).view(-1, 2).max(1).values
    assert (schedule.step_offsets.diff() <= (kept + 3) // 2).all()


def test_heads_with_the_most_work_go_first() -> None:
    sparse, dense = torch.eye(8, dtype=torch.bool), torch.ones(8, 8, dtype=torch.bool).tril()
    layout = BlockLayout.from_mask(torch.stack([sparse, dense, sparse, dense]), 128)
    schedule = forward_schedule(layout, causal=True, query_end=1024, s_k=1024)
    assert schedule.head_order.tolist() == [1, 3, 0, 2]


def test_a_slice_of_heads_holds_only_its_patterns() -> None:
    layout = random_layout(128, 8, 8).heads(1, 3)
    schedule = forward_schedule(layout, causal=False, query_end=1024, s_k=1024)
    assert schedule.full_offsets.numel() == 2 * 8
    assert walked(schedule, layout, 1024, False).equal(token_mask(layout, 1024, 1024, causal=False))


@pytest.mark.parametrize("block", [64, 256])
def test_patterns_in_several_runs_have_the_same_work(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = random_layout(block, 7, 7)
    together = forward_schedule(layout, causal=True, query_end=400, s_k=400)
    for pairs in (1, len(layout.row_columns) // 2):
        layout.cache.clear()
        monkeypatch.setattr(module, "_PAIRS_AT_ONCE", pairs)
        found = forward_schedule(layout, causal=True, query_end=400, s_k=400)
        for name in ("step_offsets", "full_offsets", "chunks", "head_slot"):
            assert getattr(found, name).equal(getattr(together, name))


def test_work_is_built_once_for_all_causal_lengths() -> None:
    layout = random_layout(64, 16, 16)
    first = forward_schedule(layout, causal=True, query_end=100, s_k=100)
    assert forward_schedule(layout, causal=True, query_end=900, s_k=1000) is first
    tail = forward_schedule(layout, causal=True, query_end=900, s_k=800)
    assert tail is not first
    assert forward_schedule(layout, causal=True, query_end=900, s_k=800) is tail
    assert forward_schedule(layout, causal=True, query_end=900, s_k=801) is not tail


def arguments(block: int = 128, dtype: torch.dtype = torch.bfloat16, dim: int = 128, v_dim: int = 128, **spec: object):  # type: ignore[no-untyped-def]
    settings = {"softmax_scale": 0.1, "causal": True, "query_offset": 0, "cu_seqlens": None, "format": "sbhd"}
    q, k, v = (torch.randn(256, 1, 2, d, dtype=dtype).permute(1, 2, 0, 3) for d in (dim, dim, v_dim))
    return q, k, v, random_layout(block, 1024 // block, 1024 // block, heads=2), AttentionSpec(**settings | spec)  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (128, 128), (80, 80), (96, 96), (128, 64)])
def test_supported(block: int, dtype: torch.dtype, dim: int, v_dim: int) -> None:
    assert hopper_forward_supported(*arguments(block, dtype, dim, v_dim))


@pytest.mark.parametrize(
    "unsupported",
    [
        {"block": 32}, {"dtype": torch.float32}, {"dim": 256, "v_dim": 256}, {"dim": 64}, {"dim": 20, "v_dim": 20},
        {"cu_seqlens": torch.tensor([0, 256]), "causal": False},
    ],
    ids=str,
)  # fmt: skip
def test_left_to_the_portable_kernel(unsupported: dict[str, object]) -> None:
    assert not hopper_forward_supported(*arguments(**unsupported))  # type: ignore[arg-type]


def test_unaligned_and_expanded_inputs_are_left_to_the_portable_kernel() -> None:
    q, k, v, layout, spec = arguments()
    unaligned = torch.randn(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)
    assert not hopper_forward_supported(unaligned, k, v, layout, spec)
    assert not hopper_forward_supported(q, k[:, :1].expand_as(k), v, layout, spec)
    assert hopper_forward_supported(q, k[:, :1], v[:, :1], layout, spec)


@pytest.mark.parametrize("offset", [1, 64, 128, 300, 512])
def test_any_offset_is_supported(offset: int) -> None:
    assert hopper_forward_supported(*arguments(query_offset=offset))


def test_packed_documents_are_supported() -> None:
    assert hopper_forward_supported(*arguments(cu_seqlens=torch.tensor([0, 100, 256])))


@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"causal": False}, {"query_offset": 301}, {"format": "bhsd"}, {"dim": 64, "v_dim": 64},
        {"dtype": torch.float16}, {"dtype": torch.float16, "dim": 64, "v_dim": 64},
        {"cu_seqlens": torch.tensor([0, 256], dtype=torch.int32)},
    ],
    ids=str,
)  # fmt: skip
def test_backward_supported(block: int, options: dict[str, object]) -> None:
    assert hopper_backward_supported(*arguments(block, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "unsupported",
    [
        {"block": 32}, {"dtype": torch.float32}, {"dim": 64}, {"v_dim": 64}, {"dim": 96, "v_dim": 96},
        {"dim": 256, "v_dim": 256}, {"cu_seqlens": torch.tensor([0, 256]), "causal": False},
    ],
    ids=str,
)  # fmt: skip
def test_backward_left_to_the_portable_kernels(unsupported: dict[str, object]) -> None:
    assert not hopper_backward_supported(*arguments(**unsupported))  # type: ignore[arg-type]


def test_backward_of_what_its_indices_do_not_hold_is_left_to_the_portable_kernels() -> None:
    _, k, v, layout, spec = arguments()
    for shape in ((1, 2, 2**27, 128), (2**18, 2, 2**10, 128)):
        q = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        assert not hopper_backward_supported(q, k, v, layout, spec)
    too_many_heads = torch.empty(1, 2048, 256, 128, dtype=torch.bfloat16, device="meta")
    assert not hopper_backward_supported(too_many_heads, k, v, layout, spec)


def test_other_devices_take_the_portable_kernels() -> None:
    assert kernel_choice(*arguments()) == "triton"
    assert backward_choice(*arguments()) == "triton"


def test_deterministic_mode_takes_the_backward_without_atomics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_support, "is_hopper", lambda device: True)
    assert backward_choice(*arguments()) == "hopper"
    torch.use_deterministic_algorithms(True)
    try:
        assert backward_choice(*arguments()) == "triton"
        assert kernel_choice(*arguments()) == "hopper"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"causal": False}, {"query_offset": 333}, {"query_offset": 256}, {"format": "bshd"}, {"format": "bhsd"},
        {"documents": (0, 37, 0, 500, 1, 128, 334, 0)},
    ],
    ids=str,
)  # fmt: skip
def test_every_feature_on_a_gpu(
    dtype: torch.dtype, block: int, dim: int, options: dict[str, Any], device: torch.device
) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not a Hopper GPU")
    s_q, batch = 1000 - options.get("query_offset", 0), 2
    if "documents" in options:
        bounds = torch.tensor((0, *options["documents"]), device=device).cumsum(0)
        options, batch = {"cu_seqlens": bounds.to(torch.int32)}, 1
    problem = Problem(
        heads=8, kv_heads=2, batch=batch, s_q=s_q, s_k=1000, dim=dim, block=block, dtype=dtype, keep=0.3,
        options=options,
    )  # fmt: skip
    assert_as_exact_as_torch(problem, "triton", device)
