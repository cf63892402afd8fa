"""Hopper's one-pass backward with its main kernel's walk spelled out in torch; the kernels around it are interpreted.

Covers what the host and the work lists contribute; the main kernel's own instructions need a GPU.
"""

import os
from typing import Any

import pytest
import torch
from s2train.kernels import reference_attention
from s2train.kernels.hopper import pair_parts, shared_tiles
from s2train.kernels.hopper.backward_config import HopperBackwardConfig
from s2train.kernels.hopper.backward_schedule import ACTIVE_BITS, QUERY_BITS, TILE, ScheduleOptions
from s2train.kernels.interpreter import repair_interpreter
from s2train.kernels.spec import AttentionSpec
from torch import Tensor

from tests.kernels.cases import Problem

hopper_backward = pytest.importorskip("s2train.kernels.hopper.backward", reason="needs Triton's Gluon")
repair_interpreter()  # loops of the kernels around the main one need it
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in Triton's interpreter")


def box(x: Tensor, batch: int, head: int, row: int, num_rows: int = TILE) -> Tensor:
    """Rows as TMA reads them: zeros where there are none."""
    rows = row + torch.arange(num_rows)
    inside = (rows >= 0) & (rows < x.shape[2])
    return x[batch, head, rows.clamp(0, x.shape[2] - 1)] * inside[:, None]


def to_fragments(dq: Tensor) -> Tensor:
    """`_store_dq` of one half."""
    half = dq.shape[1]
    return dq.reshape(4, 2, 8, half // 8, 4, 2).permute(3, 0, 2, 4, 1, 5).reshape(half * 2, 32)


class Walk:
    """Stands in for the main kernel."""

    slots_used = 0

    def __getitem__(self, grid: tuple[int]) -> "Walk":
        self.programs = grid[0]
        return self

    def __call__(self, *arguments: Any, **options: int) -> None:
        descriptors, (meta, steps, dk, dv, slots, parts), numbers = arguments[:9], arguments[9:15], arguments[15:]
        q, k, v, dout, lse2, delta, sums, dk_out, dv_out = (x.base for x in descriptors)
        q_box, dout_box = descriptors[0], descriptors[3]
        assert dk_out is dk
        assert dv_out is dv
        head_stride, row_stride, scale, scale_log2, batch_size, num_heads, group = numbers[:7]
        first_tile, num_tiles, offset, s_k, dim, _, causal, packed, cut, _, _, rows = numbers[7:]
        assert [x.block_shape[-2] for x in (q_box, dout_box)] == [rows, rows]
        assert row_stride == dk.stride(2) == dv.stride(2)
        assert dk.shape[1] == 1 or head_stride == dk.stride(1) == dv.stride(1)
        for program in range(self.programs):
            kv, ka, kb, first, num_masked, num_steps, skip, *document = meta[program // batch_size].tolist()
            b = program % batch_size + (0 if packed else document[0])
            base_tile, shift, start, num_keys = first_tile, offset, 0, s_k
            if packed:
                base_tile, start, num_keys = -document[0], document[1], document[2]
                shift = -start
            keys = [tile * TILE + torch.arange(TILE) for tile in (ka, kb)]
            sides = [[box(x, b, kv, tile * TILE + start) for x in (k, v)] for tile in (ka, kb)]
            out = [[torch.zeros(TILE, dim), torch.zeros(TILE, dim)] for _ in sides]
            for t in range(num_steps):
                step = int(steps[first + t + (skip if packed and t >= num_masked else 0)])
                head = kv * group + (step >> (ACTIVE_BITS + QUERY_BITS))
                tile = step >> ACTIVE_BITS & (2**QUERY_BITS - 1)
                q_tile, dout_tile = (box(x, b, head, tile * rows - shift, rows) for x in (q, dout))
                place = (b * num_heads + head) * num_tiles + tile * (rows // TILE) - base_tile
                lse, d = (x[place * TILE : place * TILE + rows] for x in (lse2, delta))
                position = tile * rows + torch.arange(rows)
                dq = torch.zeros(rows, dim)
                for side, (key, (k_tile, v_tile)) in enumerate(zip(keys, sides, strict=True)):
                    p = torch.exp2(k_tile @ q_tile.T * scale_log2 - lse)
                    if t < num_masked:
                        seen = (key[:, None] <= position) if causal else torch.ones(TILE, rows, dtype=torch.bool)
                        p = p * (bool(step >> side & 1) & seen & (key < num_keys)[:, None])
                    ds = p * (v_tile @ dout_tile.T - d)
                    out[side][0] += ds @ q_tile
                    out[side][1] += p @ dout_tile
                    dq += ds.T @ k_tile
                halves = dq.split(dim // 2, 1) if rows == TILE else dq.split(TILE)
                for c, half in enumerate(halves):
                    row = place * 2 * dim + c * half.shape[1] * 2
                    sums[row : row + half.shape[1] * 2] += to_fragments(half)
            slot = int(slots[program // batch_size]) if cut else -1
            if slot >= 0:
                self.slots_used += 1
                for place, sums_of_side in zip(parts[slot, program % batch_size], out, strict=True):
                    place.copy_(torch.cat(sums_of_side).flatten())
                continue
            for key, (dk_tile, dv_tile) in zip(keys, out, strict=True):
                kept = key < (num_keys if packed else dk.shape[2])
                dk[b, kv, start + key[kept]] = dk_tile[kept] * scale
                dv[b, kv, start + key[kept]] = dv_tile[kept]


@pytest.fixture
def walk(monkeypatch: pytest.MonkeyPatch) -> Walk:
    """Put in the main kernel's place."""
    stand_in = Walk()
    monkeypatch.setattr(hopper_backward, "s2_attention_bwd_kernel_hopper", stand_in)
    return stand_in


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dim", [pytest.param(64, marks=pytest.mark.long), 128])
@pytest.mark.parametrize(
    ("block", "heads", "kv_heads", "s_q", "s_k", "options"),
    [
        (64, 4, 2, 200, 200, {}),
        (128, 2, 2, 130, 130, {"batch": 2}),
        (64, 2, 1, 130, 130, {"batch": 2, "layout": "static batch"}),
        (64, 2, 1, 130, 130, {"batch": 2, "layout": "top-k"}),
        (128, 4, 2, 250, 250, {"batch": 2, "layout": "top-k shared"}),
        (256, 2, 1, 150, 300, {"query_offset": 150, "layout": "top-k"}),
        (64, 2, 2, 100, 170, {"query_offset": 37, "causal": False, "layout": "top-k shared"}),
        (128, 2, 1, 150, 300, {"query_offset": 150}),
        (64, 2, 2, 100, 170, {"query_offset": 37, "causal": False}),
        (64, 4, 2, 233, 233, {"documents": (37, 0, 130, 1, 65)}),
        (128, 2, 2, 256, 256, {"documents": (128, 0, 128)}),
        (256, 2, 1, 67, 67, {"documents": (0, 66, 1)}),
    ],
    ids=str,
)
def test_gradients(
    dim: int, block: int, heads: int, kv_heads: int, s_q: int, s_k: int, options: dict[str, Any], walk: Walk
) -> None:  # fmt: skip
    check_gradients(dim, block, heads, kv_heads, s_q, s_k, options)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("block", "heads", "kv_heads", "s_q", "s_k", "options"),
    [
        (128, 4, 2, 300, 300, {"batch": 2, "keep": 1.0}),  # of so few blocks, random ones may leave nothing to cut
        (64, 2, 1, 250, 250, {"batch": 2, "layout": "static batch"}),
        (64, 4, 2, 250, 170, {"layout": "top-k", "query_offset": 37, "causal": False}),
        (128, 4, 2, 300, 300, {"batch": 2, "layout": "top-k shared"}),
        (64, 2, 1, 200, 200, {"documents": (130, 70)}),
    ],
    ids=str,
)
def test_gradients_where_programs_share_pairs(
    block: int, heads: int, kv_heads: int, s_q: int, s_k: int, options: dict[str, Any], walk: Walk,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(pair_parts, "LEAST_STEPS", 3)
    monkeypatch.setattr(pair_parts, "multiprocessors", lambda device: 8)
    check_gradients(64, block, heads, kv_heads, s_q, s_k, {"split": True, "keep": 0.9} | options)
    # 8 programs at once leave room for 21 slots; packed documents are not split
    assert walk.slots_used > 0 or "documents" in options


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("block", "heads", "kv_heads", "s_q", "s_k", "options"),
    [
        (128, 2, 1, 300, 300, {"batch": 2}),
        (256, 2, 2, 150, 300, {"query_offset": 150}),
        (128, 2, 1, 100, 170, {"query_offset": 37, "causal": False}),
    ],
    ids=str,
)
def test_gradients_with_steps_of_128_queries(
    block: int, heads: int, kv_heads: int, s_q: int, s_k: int, options: dict[str, Any], walk: Walk
) -> None:  # fmt: skip
    config = HopperBackwardConfig(2, schedule=ScheduleOptions(query_tile=128))
    check_gradients(64, block, heads, kv_heads, s_q, s_k, options | {"config": config})


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("by_query_head", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "s_q", "s_k", "options"),
    [
        (4, 1, 640, 640, {"batch": 2}),
        (4, 2, 400, 590, {"batch": 2, "layout": "static batch", "query_offset": 190}),
        (4, 2, 500, 460, {"query_offset": 37, "causal": False}),
    ],
    ids=str,
)
def test_gradients_where_tiles_have_second_partners(
    heads: int, kv_heads: int, s_q: int, s_k: int, options: dict[str, Any], by_query_head: bool, walk: Walk,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(shared_tiles, "_LEAST_STEPS", 1)
    schedule = ScheduleOptions(second_pairs=True, by_query_head=by_query_head)
    config = HopperBackwardConfig(3, schedule=schedule)
    check_gradients(64, 64, heads, kv_heads, s_q, s_k, options | {"config": config, "keep": 0.5})
    assert walk.slots_used > 0


def test_options_that_a_call_does_not_support_are_rejected() -> None:
    config = HopperBackwardConfig(2, schedule=ScheduleOptions(query_tile=128))
    with pytest.raises(ValueError, match=r"query_tile=128.* takes head dimension 64"):
        check_gradients(128, 128, 2, 1, 128, 128, {"config": config})


def check_gradients(
    dim: int, block: int, heads: int, kv_heads: int, s_q: int, s_k: int, options: dict[str, Any]
) -> None:
    offset, causal = options.get("query_offset", 0), options.get("causal", True)
    bounds = options.get("documents") and torch.tensor((0, *options["documents"])).cumsum(0).int()
    batch = options.get("batch", 1)
    problem = Problem(
        heads=heads, kv_heads=kv_heads, s_q=s_q, s_k=s_k, dim=dim, block=block, batch=batch,
        keep=options.get("keep", 0.6), layout=options.get("layout", "static"), options={"query_offset": offset},
    )  # fmt: skip
    (q, k, v), layout, _, _ = problem.make(torch.device("cpu"))
    settings = {"causal": causal, "query_offset": offset, "cu_seqlens": bounds}
    out, lse = reference_attention(q, k, v, layout, **settings)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad([out, lse.masked_fill(lse == -torch.inf, 0)], [q, k, v], [dout, dlse])
    spec = AttentionSpec(dim**-0.5, causal, offset, bounds, "sbhd", split_columns=options.get("split", False))
    views = [x.detach().permute(1, 2, 0, 3) for x in (q, k, v, out)]
    measured = hopper_backward.hopper_backward(
        *views, lse.detach(), dout.permute(1, 2, 0, 3), dlse.masked_fill(lse == -torch.inf, 7.0), layout, spec,
        options.get("config"),
    )  # fmt: skip
    for name, x, wanted in zip(("dq", "dk", "dv"), measured, expected, strict=True):
        error = (x.permute(2, 0, 1, 3) - wanted).norm()
        assert error <= 1e-5 * wanted.norm(), f"{name}: error {error:.1e} of {wanted.norm():.1e}"
