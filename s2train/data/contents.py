"""Fingerprints of datasets' contents, which a resumed run compares.

A fingerprint is text: fields, joined by ", ". Later formats added fields at the end, so a fingerprint of an earlier
format is compared by the fields that it has:

    "408000 bytes, 1f0c3a5e"                                size of the .bin; checksum of the first MiB of the .idx
    "408000 bytes, 1f0c3a5e, 9b2d7711"                      … and of the first MiB of the .bin
    "408000 bytes, 1f0c3a5e, 9b2d7711, 0a4be1c2 5d00f3a9"   … and of blocks spread over the .idx and the .bin
"""

import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from s2train.data.blend import dataset_prefixes

_HEAD_BYTES = 1 << 20
_BLOCKS = 64
_BLOCK_BYTES = 1 << 16
_READS_AT_ONCE = 16  # each may wait for a disk or a network
_SEPARATOR = ", "
_FIELDS_WITH_TOKENS = 3


def contents_of(prefix: str) -> str:
    """Fingerprint a dataset's contents, independent of its path.

    Reads at most 5 MiB of each file, however long: the first MiB, and 64 blocks of 64 KiB at equal distances, of which
    the last ends the file. Up to 4 MiB, the blocks are the whole file. In a longer one, they show every change in place
    that is as long as 1/63 of the file. If a share p of all blocks changes at random, they show it with probability
    1 - (1 - p)^64. A change of a few documents can lie between them.
    """
    heads, spreads = [], []
    for suffix in (".idx", ".bin"):
        file = os.open(prefix + suffix, os.O_RDONLY)
        try:
            size = os.fstat(file).st_size
            heads.append(f"{zlib.crc32(os.pread(file, _HEAD_BYTES, 0)):08x}")
            spreads.append(f"{_checksum_of_blocks(file, size):08x}")
        finally:
            os.close(file)
    return _SEPARATOR.join([f"{size} bytes", *heads, " ".join(spreads)])


def contents_at(path: Any) -> list[str] | None:
    """Fingerprint the datasets that a setting such as `data.path` names.

    None if a file is missing.
    """
    try:
        return [contents_of(prefix) for prefix in dataset_prefixes(path)]
    except FileNotFoundError:
        return None


def are_same(saved: Sequence[str], found: Sequence[str], *, at_same_paths: bool) -> bool:
    """Compare saved fingerprints of datasets with those found now.

    Args:
        at_same_paths: whether the datasets have the saved paths. If not, those of the first format differ: other tokens
            could have the same lengths.
    """
    if len(saved) != len(found):
        return False
    for before, now in zip(saved, found, strict=True):
        fields = before.split(_SEPARATOR)
        if len(fields) < _FIELDS_WITH_TOKENS and not at_same_paths:
            return False
        if fields != now.split(_SEPARATOR)[: len(fields)]:
            return False
    return True


def _checksum_of_blocks(file: int, size: int) -> int:
    last = max(0, size - _BLOCK_BYTES)  # where the last block begins
    starts = [last * number // (_BLOCKS - 1) for number in range(_BLOCKS)]
    checksum = zlib.crc32(str(size).encode())
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        for block in pool.map(partial(os.pread, file, _BLOCK_BYTES), sorted(set(starts))):
            checksum = zlib.crc32(block, checksum)
    return checksum
