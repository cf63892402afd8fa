"""Renumber some query and key blocks of a layout, per KV head."""

import torch
from torch import Tensor

from s2train.kernels.layout import BlockLayout


def renumber(layout: BlockLayout, rows: Tensor, columns: Tensor, num_rows: int, num_columns: int) -> BlockLayout:
    """Build a layout from causal pairs whose blocks get new numbers.

    Both blocks of a pair must get one. Memory and time grow with the number of kept blocks, on the layout's device.

    Args:
        layout: of H heads.
        rows: int64 [query blocks]: unique new numbers below `num_rows`, or -1 to leave a block out.
        columns: int64 [H_kv, key blocks]: the same for key blocks, per KV head; H_kv divides H.
        num_rows, num_columns: blocks of the new layout.
    """
    sets, set_of_group = columns.unique(dim=0, return_inverse=True)
    set_of_head = set_of_group.repeat_interleave(layout.num_heads // len(columns)).tolist()
    variants: dict[tuple[int, int], int] = {}
    pattern_of_head = [
        variants.setdefault(pair, len(variants))
        for pair in zip(layout.patterns_of_heads("context parallelism").tolist(), set_of_head, strict=True)
    ]
    new_rows, new_columns = [], []
    for pattern, column_set in variants:
        query, key = causal_pairs(layout, pattern)
        row, column = rows[query], sets[column_set][key]
        known = (row >= 0) & (column >= 0)
        new_rows.append(row[known])
        new_columns.append(column[known])
    number = torch.repeat_interleave(
        torch.arange(len(variants), device=layout.device),
        torch.tensor([len(row) for row in new_rows], device=layout.device),
    )
    row, column = torch.cat(new_rows), torch.cat(new_columns)
    if len(row) >= 2**31 - 2**16:
        raise ValueError(f"{len(row)} kept blocks are too many for 32-bit indices: use larger blocks")
    row_offsets, row_columns = _lines(number * num_rows + row, column, len(variants) * num_rows, num_columns)
    column_offsets, column_rows = _lines(number * num_columns + column, row, len(variants) * num_columns, num_rows)
    return BlockLayout(
        block_size=layout.block_size,
        num_heads=layout.num_heads,
        num_query_blocks=num_rows,
        num_key_blocks=num_columns,
        pattern_of_head=torch.tensor([pattern_of_head], dtype=torch.int32, device=layout.device),
        row_offsets=row_offsets,
        row_columns=row_columns,
        column_offsets=column_offsets,
        column_rows=column_rows,
    )


def causal_pairs(layout: BlockLayout, pattern: int) -> tuple[Tensor, Tensor]:
    """Return the causal pairs of one pattern.

    Returns query and key blocks, int64 [pairs].
    """
    first = pattern * layout.num_query_blocks
    offsets = layout.row_offsets[first : first + layout.num_query_blocks + 1].long()
    blocks = torch.arange(layout.num_query_blocks, device=layout.device)
    begin, end = offsets[[0, -1]].tolist()
    query, key = torch.repeat_interleave(blocks, offsets.diff()), layout.row_columns[begin:end].long()
    causal = key <= query
    return query[causal], key[causal]


def _lines(line: Tensor, member: Tensor, num_lines: int, num_members: int) -> tuple[Tensor, Tensor]:
    """Sort (line, member) pairs in any order into offsets and members.

    Returns offsets [lines + 1] and members, both int32; members ascend within a line.
    """
    offsets = torch.zeros(num_lines + 1, dtype=torch.int32, device=line.device)
    offsets[1:] = torch.bincount(line, minlength=num_lines).cumsum(0)
    ordered = (line * num_members + member).sort().values
    return offsets, (ordered % num_members).to(torch.int32)
