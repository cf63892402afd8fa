"""Copy units of keys and values by index, packed for a collective."""

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # keys and values


def take(units: Pair, where: tuple[Tensor, ...]) -> Tensor:
    """Pack indexed units; in the last dimension a value follows its key."""
    key, value = units
    width, more = key.shape[-1], value.shape[-1]
    packed = key.new_empty(where[0].shape[0], *key.shape[len(where) : -1], width + more)
    index = torch.ops.aten.index.Tensor_out  # Python's indexing can't write to a part
    index(key, where, out=packed.narrow(-1, 0, width))
    index(value, where, out=packed.narrow(-1, width, more))
    return packed


def put(packed: Tensor, units: Pair, where: tuple[Tensor, ...]) -> None:
    """Write what `take` packed to the indexed units."""
    key, value = units
    width, more = key.shape[-1], value.shape[-1]
    key.index_put_(where, packed.narrow(-1, 0, width))
    value.index_put_(where, packed.narrow(-1, width, more))


def copy(source: Tensor, target: Tensor) -> None:
    """Copy to a contiguous tensor."""
    if not source.is_contiguous():
        source, target = wide(source, target)
    target.copy_(source)


def wide(first: Tensor, second: Tensor) -> Pair:
    """View both as elements of 16 bytes if that is possible.

    CUDA's index kernels copy an element per thread and step. By 2 bytes, they reach an eighth of an H200's bandwidth.
    """
    ratio = torch.complex128.itemsize // first.element_size()
    if _divides(ratio, first) and _divides(ratio, second):
        return first.view(torch.complex128), second.view(torch.complex128)
    return first, second


def _divides(ratio: int, x: Tensor) -> bool:
    if x.shape[-1] % ratio or x.storage_offset() % ratio:
        return False
    return x.stride(-1) == 1 and all(n % ratio == 0 for n in x.stride()[:-1])  # a dimension of 1 may have any stride
