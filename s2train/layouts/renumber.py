"""Renumber some query and key blocks of a layout, per KV head."""

import numpy as np
import torch

from s2train.kernels.layout import BlockLayout
from s2train.layouts.host_layout import HostLayout


def renumber(layout: HostLayout, rows: np.ndarray, columns: np.ndarray, num_rows: int, num_columns: int) -> BlockLayout:
    """Build a layout from causal pairs whose blocks get new numbers.

    Both blocks of a pair must get one. The layout is on the host. Memory and time grow with the number of blocks that
    the numbered rows keep.

    Args:
        layout: of H heads.
        rows: int64 [query blocks]: unique new numbers below `num_rows`, or -1 to leave a block out.
        columns: int64 [H_kv, key blocks]: the same for key blocks, per KV head; H_kv divides H.
        num_rows, num_columns: blocks of the new layout.
    """
    set_of_group = [of_group.tobytes() for of_group in columns]
    members = len(layout.pattern_of_head) // len(columns)
    variants: dict[tuple[int, bytes], int] = {}
    groups: list[int] = []  # a KV head with the columns of each variant
    pattern_of_head: list[int] = []
    for head, pattern in enumerate(layout.pattern_of_head.tolist()):
        group = head // members
        pattern_of_head.append(variants.setdefault((pattern, set_of_group[group]), len(variants)))
        if len(variants) > len(groups):
            groups.append(group)
    variant, row, column = _numbered_pairs(layout, [pattern for pattern, _ in variants], rows, columns[groups])
    if len(row) >= 2**31 - 2**16:
        raise ValueError(f"{len(row)} kept blocks are too many for 32-bit indices: use larger blocks")
    by_row = _lines(variant * num_rows + row, column, len(variants) * num_rows, num_columns)
    by_column = _lines(variant * num_columns + column, row, len(variants) * num_columns, num_rows)
    tensors = (torch.from_numpy(x) for x in (np.array([pattern_of_head], np.int32), *by_row, *by_column))
    return BlockLayout(layout.block_size, len(pattern_of_head), num_rows, num_columns, *tensors)


def _numbered_pairs(
    layout: HostLayout, patterns: list[int], rows: np.ndarray, columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the causal pairs whose blocks get numbers.

    Returns variants, new rows and new columns, int64 [pairs].

    Args:
        patterns: of each variant.
        rows: as in `renumber`.
        columns: the same for each variant.
    """
    chosen = np.flatnonzero(rows >= 0)
    lines = (np.array(patterns)[:, None] * layout.num_rows + chosen).ravel()
    begin, end = (layout.offsets[lines + n].astype(np.int64) for n in (0, 1))
    counts = end - begin
    number = np.repeat(np.arange(len(lines)), counts)
    key = layout.columns[np.arange(len(number)) + (begin - (counts.cumsum() - counts))[number]]
    variant, query = np.divmod(np.arange(len(lines)), len(chosen))
    variant, query = variant[number], chosen[query][number]
    column = columns[variant, key]
    known = (column >= 0) & (key <= query)
    return variant[known], rows[query[known]], column[known]


def _lines(line: np.ndarray, member: np.ndarray, num_lines: int, num_members: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort (line, member) pairs in any order into offsets and members.

    Returns offsets [lines + 1] and members, both int32; members ascend within a line.
    """
    offsets = np.zeros(num_lines + 1, np.int32)
    offsets[1:] = np.bincount(line, minlength=num_lines).cumsum()
    ordered = np.sort(line * num_members + member)
    return offsets, (ordered % num_members).astype(np.int32)
