"""Cut long columns of the backward into parts for several programs.

A column is a key block with the queries that keep it. One program visits it for dk and dv, so a key block that all
queries keep outlasts the others. Its parts are consecutive ranges of its visits. Each part's sums of dk and dv go to
its own slot in float32 memory, and `part_sums` adds the slots of a column in order: results are the same in every run.
Only torch operators are used here. Sizes depend on shapes alone, so that the host never waits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .configs import multiprocessors
from .layout import BlockLayout
from .topk_layout import Layout

# Rows of queries, over all heads of a group, below which a column stays whole: 0.3 ms on an H100, where a program's
# start and end take 5 us.
LEAST_ROWS = 8192
SUM_COLUMNS = 6  # of `ColumnParts.sums`


@dataclass(frozen=True)
class Cut:
    """Parts of columns, in the order of columns.

    Tensors are int64, on the columns' device. A column with more than `limit` visits is heavy: it has at least two
    parts. The other columns have one.

    - ``column``, ``low``, ``high`` [columns + slots]: each part's column, and its range of the column's visits.
    - ``slot`` [columns + slots]: where the part's sums go; -1 for a whole column, -2 for a surplus entry.
    - ``heavy`` [slots // 2]: the heavy columns, then the number of columns.
    - ``first_slot``, ``count`` [slots // 2]: their slots; count 0 for what is no column.
    """

    column: Tensor
    low: Tensor
    high: Tensor
    slot: Tensor
    heavy: Tensor
    first_slot: Tensor
    count: Tensor
    slots: int


@dataclass(frozen=True)
class ColumnParts:
    """Work of the portable dk, dv programs, and parts to add afterwards.

    Tensors are int32, on the layout's device.

    - ``rows`` [programs, 4], most visits first: the column as in `columns_by_work`, its range of visits, its slot.
    - ``sums`` [n, 6]: first slot, number of slots (0: none), KV head, sequence, first key, keys between tiles.
    """

    rows: Tensor
    sums: Tensor
    slots: int


def most_slots(copies: int, at_once: int) -> int:
    """Return the most slots that `cut_columns` can fill."""
    return 8 * at_once // (3 * copies)


def cut_columns(work: Tensor, least: int, copies: int, at_once: int) -> Cut:
    """Cut columns with more than 3/4 of a multiprocessor's share of work.

    The parts of a column differ by at most one visit, and have at most 3/4 of that limit. A heavy column has two thirds
    of a multiprocessor's work or more for each of its slots, which bounds their number.

    Args:
        work: int64 [columns], visits of each.
        least: visits below which a column stays whole, at least 2.
        copies: programs that do the same work for each part.
        at_once: programs that the device runs at once.
    """
    columns, slots = len(work), most_slots(copies, at_once)
    limit = (-(work.sum() * (-3 * copies) // (4 * at_once))).clamp(min=least)
    count = torch.where(work > limit, 2 * work // limit, 1)
    is_heavy = count > 1
    ends = count.cumsum(0)
    number = torch.arange(columns + slots, device=work.device)
    column = torch.searchsorted(ends, number, right=True)
    surplus = column == columns
    column = column.clamp(max=columns - 1)
    part = number - (ends - count)[column]
    low, high = (x * work[column] // count[column] for x in (part, part + 1))
    of_heavy = torch.where(is_heavy, count, 0)
    first_slot = of_heavy.cumsum(0) - of_heavy
    slot = torch.where(is_heavy[column], first_slot[column] + part, -1)
    wanted = torch.arange(1, slots // 2 + 1, device=work.device)
    heavy = torch.searchsorted(is_heavy.cumsum(0), wanted)
    found = heavy.clamp(max=columns - 1)
    return Cut(
        column=column,
        low=torch.where(surplus, 0, low),
        high=torch.where(surplus, 0, high),
        slot=torch.where(surplus, -2, slot),
        heavy=heavy,
        first_slot=first_slot[found],
        count=torch.where(heavy < columns, of_heavy[found], 0),
        slots=slots,
    )


def trimmed(cut: Cut) -> Cut | None:
    """Drop surplus entries; return None if no column is heavy.

    Reads the device.
    """
    slots = int(cut.count.sum())
    if slots == 0:
        return None
    parts, heavy = cut.slot != -2, cut.count > 0
    return Cut(
        column=cut.column[parts],
        low=cut.low[parts],
        high=cut.high[parts],
        slot=cut.slot[parts],
        heavy=cut.heavy[heavy],
        first_slot=cut.first_slot[heavy],
        count=cut.count[heavy],
        slots=slots,
    )


def column_parts(layout: Layout, num_kv_heads: int, sequences: int, rows: int) -> ColumnParts | None:
    """Cut a layout's long columns for the portable kernel.

    Returns None if there are none. Cached in the layout. A static layout's columns are read once. Those of a
    `TopKLayout` stay on the device, and may all be whole; None then only means that they can't be long.

    Args:
        sequences: sequences of the batch that share each column.
        rows: keys of a program.
    """
    least = max(2, LEAST_ROWS // layout.block_size)
    key = ("column_parts", num_kv_heads, sequences, rows, least)

    def build(source: Layout) -> ColumnParts | None:
        return _column_parts(source, layout.device, num_kv_heads, sequences, rows, least)

    if not isinstance(layout, BlockLayout):
        if layout.num_query_blocks * (layout.num_heads // num_kv_heads) <= least:
            return None
        return layout.built(key, lambda: build(layout))
    if key not in layout.cache:
        layout.cache[key] = layout.scheduled(build)
    found: ColumnParts | None = layout.cache[key]
    return found


def _column_parts(
    layout: Layout, device: torch.device, num_kv_heads: int, sequences: int, rows: int, least: int
) -> ColumnParts | None:
    num_key_blocks, block = layout.num_key_blocks, layout.block_size
    copies, at_once = sequences * (block // rows), multiprocessors(device)
    if most_slots(copies, at_once) < 2:
        return None
    counts = layout.column_offsets.diff().long().view(-1, num_key_blocks)[layout.pattern_of_head.long()]
    work = counts.view(layout.batch_size * num_kv_heads, -1, num_key_blocks).sum(1).flatten()
    cut: Cut | None = cut_columns(work, least, copies, at_once)
    if isinstance(layout, BlockLayout):
        cut = None if cut is None else trimmed(cut)
    if cut is None:
        return None
    visits = torch.where(cut.slot == -2, -1, cut.high - cut.low)
    order = visits.argsort(descending=True, stable=True)
    table = torch.stack([cut.column, cut.low, cut.high, cut.slot], 1)[order]
    kv_head = cut.heavy // num_key_blocks
    first_key = cut.heavy % num_key_blocks * block
    columns = (
        cut.first_slot, cut.count, kv_head % num_kv_heads, kv_head // num_kv_heads, first_key,
        torch.full_like(first_key, rows),
    )  # fmt: skip
    return ColumnParts(table.to(torch.int32), torch.stack(columns, 1).to(torch.int32), cut.slots)
