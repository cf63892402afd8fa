"""Fill a layout's offsets and indices in pieces, with bounded scratch memory.

A line is a query block with the key blocks that it keeps, or, in the other direction, a key block with the query
blocks that keep it. Lines are counted first, then written in order into a tensor of exactly that size. Nothing is
sorted, and no mask of a whole pattern is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Maps (query, key) int64 block indices that broadcast to a bool of the broadcast shape: is the pair kept?
Rule = Callable[[Tensor, Tensor], Tensor]

# Limits scratch memory to about 40 MB: a rule may take 16 bytes per pair evaluated at once, and a column rule takes
# 56 per kept pair.
_PAIRS_AT_ONCE = 1 << 21
_KEPT_AT_ONCE = 1 << 19
_MOST_KEPT = 2**31 - 2**16  # kernels advance over the indices in chunks with int32 counters


@dataclass(frozen=True)
class ColumnRule:
    """Rule that keeps a local window and whole columns; needs no mask.

    Pair (i, j) is kept if j <= i and (i - j < local or columns(j)).

    Attributes:
        local: blocks of the window, including the diagonal's; >= 1.
        columns: maps int64 key blocks to a bool of the same shape: is the block kept at every distance?
    """

    local: int
    columns: Callable[[Tensor], Tensor]

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & ((query < key + self.local) | self.columns(key))


@dataclass(frozen=True, eq=False)
class MaskRule:
    """Rule given as a bool mask [query blocks, key blocks].

    Lines are slices of it.
    """

    mask: Tensor

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        return self.mask[query, key]


class Lines(Protocol):
    """The lines of one pattern in one direction."""

    @property
    def at_once(self) -> int:
        """Lines that may be filled in one piece."""
        ...

    def counts(self) -> Tensor:
        """Return the number of blocks that each line keeps, int64 [lines]."""
        ...

    def kept(self, begin: int, end: int, total: int) -> Tensor:
        """Return what lines [begin, end) keep, int64 [total].

        Blocks come line by line, ascending in each; `total` is the sum of the lines' counts.
        """
        ...


def row_lines(rule: Rule, num_query_blocks: int, num_key_blocks: int, device: torch.device) -> Lines:
    """Return lines of query blocks with their kept key blocks."""
    if isinstance(rule, ColumnRule):
        return _ColumnRuleRows(rule, num_query_blocks, num_key_blocks, device)
    if isinstance(rule, MaskRule):
        return _PieceLines(lambda begin, end: rule.mask[begin:end], num_query_blocks, num_key_blocks)
    query, key = (torch.arange(n, device=device) for n in (num_query_blocks, num_key_blocks))
    return _PieceLines(lambda begin, end: rule(query[begin:end, None], key[None, :]), num_query_blocks, num_key_blocks)


def column_lines(rule: Rule, num_query_blocks: int, num_key_blocks: int, device: torch.device) -> Lines:
    """Return lines of key blocks with the query blocks that keep them."""
    if isinstance(rule, ColumnRule):
        return _ColumnRuleColumns(rule, num_query_blocks, num_key_blocks, device)
    if isinstance(rule, MaskRule):
        return _PieceLines(lambda begin, end: rule.mask.t()[begin:end], num_key_blocks, num_query_blocks)
    query, key = (torch.arange(n, device=device) for n in (num_query_blocks, num_key_blocks))
    return _PieceLines(lambda begin, end: rule(query[None, :], key[begin:end, None]), num_key_blocks, num_query_blocks)


def compress(lines_of: Callable[[int], Lines], num_patterns: int) -> tuple[Tensor, Tensor]:
    """Build offsets and kept blocks of all patterns.

    Both are int32; offsets are [all lines + 1]. The host waits for the counts.

    Args:
        lines_of: returns the lines of a pattern; called twice a pattern, so that only one pattern's lines are in memory
            at a time.
    Raises:
        ValueError: more blocks are kept than 32 bits can index; raised before any index is stored.
    """
    counts = torch.cat([lines_of(pattern).counts() for pattern in range(num_patterns)])
    offsets = torch.zeros(len(counts) + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    bounds = offsets.cpu()
    if int(bounds[-1]) >= _MOST_KEPT:
        raise ValueError(f"{int(bounds[-1])} kept blocks are too many for 32-bit indices: use larger blocks")
    indices = torch.empty(int(bounds[-1]), dtype=torch.int32, device=counts.device)
    num_lines = len(counts) // num_patterns
    for pattern in range(num_patterns):
        lines = lines_of(pattern)
        of_pattern = bounds[pattern * num_lines : (pattern + 1) * num_lines + 1]
        for begin, end in _pieces(of_pattern, lines.at_once):
            first, last = int(of_pattern[begin]), int(of_pattern[end])
            if first < last:
                indices[first:last] = lines.kept(begin, end, last - first)
    return offsets.to(torch.int32), indices


def _pieces(bounds: Tensor, at_once: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of lines to fill in one piece.

    `bounds` [lines + 1] are offsets on the host.
    """
    begin, end = 0, len(bounds) - 1
    while begin < end:
        by_kept = int(torch.searchsorted(bounds, bounds[begin] + _KEPT_AT_ONCE, right=True)) - 1
        stop = max(begin + 1, min(by_kept, begin + at_once))
        yield begin, stop
        begin = stop


@dataclass(frozen=True)
class _PieceLines:
    """Lines of a mask that is computed in pieces.

    Attributes:
        piece: maps (begin, end) to the bool mask of these lines, [end - begin, num_others] or broadcastable to it.
    """

    piece: Callable[[int, int], Tensor]
    num_lines: int
    num_others: int

    @property
    def at_once(self) -> int:
        return max(1, _PAIRS_AT_ONCE // self.num_others)

    def counts(self) -> Tensor:
        begins = range(0, self.num_lines, self.at_once)
        return torch.cat([self._mask(b, min(b + self.at_once, self.num_lines)).sum(1) for b in begins])

    def kept(self, begin: int, end: int, total: int) -> Tensor:
        found = self._mask(begin, end).flatten().nonzero().flatten()
        if len(found) != total:
            raise ValueError("a rule must keep the same pairs in every call: draw random ones beforehand")
        return found.remainder_(self.num_others)

    def _mask(self, begin: int, end: int) -> Tensor:
        mask = self.piece(begin, end)
        if mask.dtype != torch.bool:
            raise ValueError(f"a rule must return a bool tensor, got {mask.dtype}: compare with something")
        return mask.expand(end - begin, self.num_others)


class _ColumnRuleRows:
    """Rows of a `ColumnRule`: columns before the window, then the window."""

    at_once = 1 << 62

    def __init__(self, rule: ColumnRule, num_query_blocks: int, num_key_blocks: int, device: torch.device) -> None:
        row, key = torch.arange(num_query_blocks, device=device), torch.arange(num_key_blocks, device=device)
        self._is_column = rule.columns(key)
        columns_before = torch.zeros(num_key_blocks + 1, dtype=torch.int64, device=device)
        torch.cumsum(self._is_column, 0, out=columns_before[1:])
        window_end = (row + 1).clamp(max=num_key_blocks)
        self._window = (row + 1 - rule.local).clamp(min=0).minimum(window_end)
        self._far = columns_before[self._window]
        self._counts = self._far + window_end - self._window

    def counts(self) -> Tensor:
        return self._counts

    def kept(self, begin: int, end: int, total: int) -> Tensor:
        counts, far = self._counts[begin:end], self._far[begin:end]
        first = counts.cumsum(0) - counts
        number = torch.arange(total, device=counts.device)
        line = torch.repeat_interleave(counts, output_size=total)
        in_line = number - first[line]
        # first the columns, then all others, so that the host need not wait for their number
        columns = (~self._is_column).to(torch.int8).argsort(stable=True)
        column = columns[in_line.clamp(max=len(columns) - 1)]
        in_window = number.add_((self._window[begin:end] - far - first)[line])
        return torch.where(in_line < far[line], column, in_window)


class _ColumnRuleColumns:
    """Columns of a `ColumnRule`.

    A column is kept from the diagonal to the end, or to the window's end.
    """

    at_once = 1 << 62

    def __init__(self, rule: ColumnRule, num_query_blocks: int, num_key_blocks: int, device: torch.device) -> None:
        key = torch.arange(num_key_blocks, device=device)
        below = (num_query_blocks - key).clamp(min=0)
        self._counts = torch.where(rule.columns(key), below, below.clamp(max=rule.local))

    def counts(self) -> Tensor:
        return self._counts

    def kept(self, begin: int, end: int, total: int) -> Tensor:
        counts = self._counts[begin:end]
        shift = torch.arange(begin, end, device=counts.device) - (counts.cumsum(0) - counts)
        return torch.repeat_interleave(shift, counts, output_size=total).add_(torch.arange(total, device=counts.device))
