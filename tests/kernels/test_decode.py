"""The decode op: one query a sequence over pages, against plain attention over contiguous keys in float64."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from s2train.kernels import BlockLayout, reference_attention
from s2train.kernels.decode.op import append_token, block_sparse_decode
from s2train.kernels.decode.pages import last_uses, write_tokens
from s2train.kernels.decode.schedule import decode_schedule
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BACKENDS = ("torch", "triton")


def random_layout(heads: int, num_blocks: int, block: int, keep: float = 0.5) -> BlockLayout:
    """Heads of their own, of which no key block's use has any order: dropped blocks are taken up again."""
    return BlockLayout.from_mask(torch.rand(heads, num_blocks, num_blocks) < keep, block)


def shared_layout(heads: int, group: int, num_blocks: int, block: int) -> BlockLayout:
    """Heads of a group keep the same."""
    masks = torch.rand(heads // group, num_blocks, num_blocks) < 0.5
    return BlockLayout.from_mask(masks.repeat_interleave(group, 0), block)


@dataclass
class Paged:
    """Random queries, keys and values of unequal positions, contiguous and in pages."""

    q: Tensor
    k: Tensor  # [b, H_kv, s, d]
    v: Tensor
    keys: Tensor
    values: Tensor
    table: Tensor
    positions: Tensor
    layout: BlockLayout | None
    block: int

    @classmethod
    def make(
        cls, layout: BlockLayout | None, positions: list[int], heads: int, kv_heads: int, block: int, num_blocks: int,
        dim: int = 16, v_dim: int = 16, dtype: torch.dtype = torch.float32,
    ) -> "Paged":  # fmt: skip
        batch, length = len(positions), num_blocks * block
        q = torch.randn(batch, heads, dim).to(dtype)
        k, v = (torch.randn(batch, kv_heads, length, d).to(dtype) for d in (dim, v_dim))
        last_use = torch.full((kv_heads, num_blocks), num_blocks) if layout is None else last_uses(layout, kv_heads)
        block_of = torch.tensor(positions)[:, None, None] // block
        # only what is needed has a page, and pages lie in no order
        held = (last_use[None] >= block_of) & (torch.arange(num_blocks) <= block_of)
        table = torch.full((batch, kv_heads, num_blocks), -1, dtype=torch.int32)
        count = int(held.sum())
        table[held] = torch.randperm(count).int()
        keys, values = (torch.full((count + 1, block, d), torch.nan, dtype=dtype) for d in (dim, v_dim))
        write_tokens(keys, table, k, 0)
        write_tokens(values, table, v, 0)
        keys[-1] = values[-1] = torch.nan
        return cls(q, k, v, keys, values, table, torch.tensor(positions, dtype=torch.int32), layout, block)

    def decode(self, backend: str, num_splits: int | None = None) -> tuple[Tensor, Tensor]:
        return block_sparse_decode(
            self.q, self.keys, self.values, self.table, self.positions, self.layout, backend=backend,
            num_splits=num_splits,
        )  # fmt: skip

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Each sequence by itself, over contiguous keys."""
        outs, lses = [], []
        num_blocks = self.table.shape[2]
        mask = torch.ones(self.q.shape[1], num_blocks, num_blocks, dtype=torch.bool)
        layout = BlockLayout.from_mask(mask, self.block) if self.layout is None else self.layout
        for i, position in enumerate(self.positions.tolist()):
            if position < 0:
                outs.append(torch.zeros(self.q.shape[1], self.v.shape[-1], dtype=dtype))
                lses.append(torch.full(self.q.shape[1:2], -torch.inf, dtype=dtype))
                continue
            q = self.q[i : i + 1, :, None].to(dtype)
            k, v = (x[i : i + 1, :, : position + 1].to(dtype) for x in (self.k, self.v))
            out, lse = reference_attention(q, k, v, layout, query_offset=position, format="bhsd")
            outs.append(out[0, :, 0])
            lses.append(lse[0, :, 0])
        return torch.stack(outs), torch.stack(lses)


def assert_as_exact_as_torch(paged: Paged, backend: str, num_splits: int | None = None) -> None:
    out, lse = paged.decode(backend, num_splits)
    exact, plain = paged.plain(torch.float64), paged.plain(paged.q.dtype)
    assert torch.equal(lse == -torch.inf, exact[1] == -torch.inf)
    for found, x64, x_plain in zip((out, lse), exact, plain, strict=True):
        error, allowed = (
            (x.double().masked_fill(x64 == -torch.inf, 0) - x64.masked_fill(x64 == -torch.inf, 0)).norm()
            for x in (found, x_plain)
        )
        assert error <= 2 * allowed + 3e-7 * x64.masked_fill(x64 == -torch.inf, 0).norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1), (20, 1)])
def test_heads_of_a_group_keep_their_own_blocks(backend: str, heads: int, kv_heads: int) -> None:
    layout = random_layout(heads, 5, 16)
    assert_as_exact_as_torch(Paged.make(layout, [79, 33, 0], heads, kv_heads, 16, 5), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "block", [16, 64, 128, pytest.param(32, marks=pytest.mark.long), pytest.param(256, marks=pytest.mark.long)]
)
def test_positions_around_a_blocks_borders(backend: str, block: int) -> None:
    layout = random_layout(2, 3, block, keep=0.7)
    positions = [block - 2, block - 1, block, 2 * block - 1, 2 * block, 3 * block - 1]
    assert_as_exact_as_torch(Paged.make(layout, positions, 2, 1, block, 3), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_layout_every_earlier_key_is_seen(backend: str) -> None:
    assert_as_exact_as_torch(Paged.make(None, [0, 15, 16, 77], 4, 2, 16, 5), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_without_a_query_give_zero(backend: str) -> None:
    assert_as_exact_as_torch(Paged.make(random_layout(2, 3, 16), [-1, 40], 2, 1, 16, 3), backend)


@pytest.mark.parametrize("num_splits", [1, 2, 7, 12])
def test_keys_may_be_split_in_any_number_of_parts(num_splits: int) -> None:
    layout = random_layout(4, 9, 16, keep=0.8)
    assert_as_exact_as_torch(Paged.make(layout, [143, 70], 4, 2, 16, 9), "triton", num_splits)


@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (128, 128), (40, 24), (256, 256)])
def test_head_dimensions(dim: int, v_dim: int) -> None:
    paged = Paged.make(random_layout(2, 3, 32), [80, 40], 2, 1, 32, 3, dim, v_dim)
    assert_as_exact_as_torch(paged, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    paged = Paged.make(random_layout(4, 4, 32), [100, 127, 31], 4, 2, 32, 4, 64, 64, dtype)
    assert_as_exact_as_torch(paged, backend)


def test_torch_converts_no_pages_of_other_sequences() -> None:
    """An engine's cache is as large as its memory."""
    paged = Paged.make(random_layout(2, 3, 16), [40], 2, 2, 16, 3, dtype=torch.bfloat16)
    pages = torch.cat([paged.keys, paged.keys.new_zeros(1000, 16, 16)])

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor):
                self.elements = max(self.elements, found.numel())
            return found

    with Largest() as largest:
        block_sparse_decode(paged.q, pages, pages, paged.table, paged.positions, paged.layout)
    assert 0 < largest.elements < pages.numel() // 10


def test_groups_that_keep_the_same_walk_the_layouts_own_rows() -> None:
    layout = shared_layout(8, 4, 5, 16)
    schedule = decode_schedule(layout, 2)
    assert schedule.bits is None
    assert schedule.columns is layout.row_columns
    assert_as_exact_as_torch(Paged.make(layout, [79, 33], 8, 2, 16, 5), "triton")


def test_a_walk_is_the_union_of_its_heads() -> None:
    heads, kv_heads, num_blocks = 40, 2, 7  # 20 heads a group: tiles of 16 and 4
    layout = random_layout(heads, num_blocks, 16, keep=0.1)
    schedule, mask = decode_schedule(layout, kv_heads), layout.mask()
    assert schedule.bits is not None
    tiles = [range(0, 16), range(16, 20), range(20, 36), range(36, 40)]
    longest = 0
    for tile, members in enumerate(tiles):
        for row in range(num_blocks):
            line = int(schedule.list_of_tile[tile]) * num_blocks + row
            low, high = int(schedule.offsets[line]), int(schedule.offsets[line + 1])
            found = dict(zip(schedule.columns[low:high].tolist(), schedule.bits[low:high].tolist(), strict=True))
            expected = {}
            for column in range(num_blocks):
                bits = sum(1 << slot for slot, head in enumerate(members) if mask[head, row, column])
                if bits:
                    expected[column] = bits
            assert found == expected
            longest = max(longest, high - low)
    assert schedule.longest == longest
    assert decode_schedule(layout, kv_heads) is schedule


@pytest.mark.parametrize("backend", BACKENDS)
def test_appended_tokens_lie_at_their_positions(backend: str) -> None:
    table = torch.tensor([[[1, 4], [0, -1]], [[3, 2], [5, -1]], [[6, 7], [8, 9]]], dtype=torch.int32)
    keys, values = torch.zeros(11, 16, 24), torch.zeros(11, 16, 8)
    k, v = torch.randn(3, 2, 24), torch.randn(3, 2, 8)
    append_token(k, v, keys, values, table, torch.tensor([18, 3, -1], dtype=torch.int32), backend=backend)
    for page, row, b, head in ((4, 2, 0, 0), (3, 3, 1, 0), (5, 3, 1, 1)):
        assert torch.equal(keys[page, row], k[b, head])
        assert torch.equal(values[page, row], v[b, head])
    written = keys[:-1].abs().sum(-1) > 0
    assert int(written.sum()) == 3  # head 1 of sequence 0 has no page, and sequence 2 no token


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"q": torch.randn(2, 3, 16)}, "not a multiple"),
        ({"q": torch.randn(2, 4, 8)}, "q must be"),
        ({"table": torch.zeros(2, 2, 3)}, "table must be int32"),
        ({"positions": torch.zeros(3, dtype=torch.int32)}, "positions must be"),
        ({"positions": torch.tensor([0, 48], dtype=torch.int32)}, "below the 48"),
        ({"layout": random_layout(2, 3, 16)}, "the layout has 2 heads"),
        ({"layout": random_layout(4, 3, 32)}, "blocks of 32"),
        ({"softmax_scale": -1.0}, "softmax_scale"),
        ({"num_splits": 0}, "num_splits"),
        ({"values": torch.zeros(2, 16, 16)}, "keys and values"),
    ],
)
def test_arguments_that_do_not_fit_are_rejected(change: dict, expected: str) -> None:
    arguments = {
        "q": torch.randn(2, 4, 16),
        "keys": torch.zeros(5, 16, 16),
        "values": torch.zeros(5, 16, 16),
        "table": torch.full((2, 2, 3), -1, dtype=torch.int32),
        "positions": torch.zeros(2, dtype=torch.int32),
        "layout": random_layout(4, 3, 16),
    }
    with pytest.raises(ValueError, match=expected):
        block_sparse_decode(**(arguments | change))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("dim", [64, 128])
def test_on_a_gpu_as_exact_as_torch(dtype: torch.dtype, block: int, dim: int) -> None:
    for layout in (random_layout(8, 20, block), shared_layout(8, 4, 20, block), None):
        paged = Paged.make(layout, [20 * block - 1, 7 * block, 11 * block + 5, -1], 8, 2, block, 20, dim, dim, dtype)
        exact, plain = paged.plain(torch.float64)[0], paged.plain(dtype)[0]
        for name in ("q", "keys", "values", "table", "positions"):
            setattr(paged, name, getattr(paged, name).cuda())
        paged.layout = None if layout is None else layout.to("cuda")
        error, allowed = (paged.decode("triton")[0].cpu().double() - exact).norm(), (plain.double() - exact).norm()
        assert error <= 2 * allowed + 3e-7 * exact.norm()


@pytest.mark.gpu
def test_a_captured_call_follows_its_positions() -> None:
    layout = random_layout(8, 9, 64)
    first, second = (Paged.make(layout, at, 8, 2, 64, 9) for at in ([100, 575], [300, 64]))
    static = [getattr(first, name).cuda() for name in ("q", "keys", "values", "table", "positions")]
    on_gpu = layout.to("cuda")
    # both with room for all pages, so that the second fits into the first's tensors
    pages = max(len(first.keys), len(second.keys))
    static[1], static[2] = (torch.zeros(pages, 64, 16, device="cuda") for _ in range(2))
    static[1][: len(first.keys)], static[2][: len(first.keys)] = first.keys.cuda(), first.values.cuda()
    block_sparse_decode(*static, on_gpu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = block_sparse_decode(*static, on_gpu)
    for name, x in zip(("q", "keys", "values", "table", "positions"), static, strict=True):
        x[: len(getattr(second, name))] = getattr(second, name).cuda()
    graph.replay()
    exact, plain = second.plain(torch.float64)[0], second.plain(torch.float32)[0]
    assert (out.cpu().double() - exact).norm() <= 2 * (plain.double() - exact).norm() + 3e-7 * exact.norm()
