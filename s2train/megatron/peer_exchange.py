"""Exchanges rows among tensor parallel ranks while they compute.

Ranks of one host address each other's memory (torch's symmetric memory). Copy engines move the rows, so that the
multiprocessors stay with the products that hide the exchange; NCCL's kernels take a share of them.

Shapes: p ranks have m rows of width w each.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import _symmetric_memory as symmetric_memory

from s2train.config import PretrainConfig
from s2train.costs.rank_share import element_bytes, rank_tokens
from s2train.errors import ConfigError, first_line
from s2train.kernels.leading_sum import leading_sum


class Gathering(Protocol):
    """All ranks' rows, on their way to this rank."""

    full: Tensor  # [p, m, w], of which a part is there once iteration gave its rank

    def __iter__(self) -> Iterator[int]:
        """Yield ranks as their rows arrive, this rank first."""


class Scattering(Protocol):
    """Sums of all ranks' parts, of which each rank keeps its rows."""

    ranks: int

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Yield a rank and memory for its part, this rank last.

        A part [m, w] is sent when the next is asked for.
        """

    def sum(self, out: Tensor) -> None:
        """Wait for all ranks' parts; write this rank's sums [m, w].

        Call it once, after iteration.
        """


class Exchange(Protocol):
    """Exchanges of one group of ranks.

    All ranks call the same, in the same order, on the stream that computes. A gathering is used up before another
    exchange is complete: before the next gathering starts, and before `sum` of a scattering.
    """

    def gather(self, rows: Tensor) -> Gathering:
        """Start to gather all ranks' rows [m, w]."""

    def scatter(self, rows: Tensor, width: int) -> Scattering:
        """Prepare parts [m, w] for all ranks' rows [p m, k]."""


def tensor_parallel_exchange(cfg: PretrainConfig, device: torch.device) -> Exchange | None:
    """Return the exchange of this rank's tensor parallel group.

    None without `parallel.tp_comm_overlap`, or without sequence parallelism, as in decoding. Call it on all ranks
    together.

    Raises:
        ConfigError: the group's GPUs can't address each other's memory, or have none left.
    """
    if not cfg.parallel.tp_overlaps:
        return None
    group = parallel_state.get_tensor_model_parallel_group()
    if device.type == "cpu":
        return Collectives(group)
    try:
        return PeerMemory(group, device, rank_tokens(cfg) * cfg.model.hidden_size * element_bytes(cfg))
    except RuntimeError as error:
        problem = f"tensor parallel ranks can't share memory of their GPUs ({first_line(error)})"
        raise ConfigError("parallel.tp_comm_overlap", True, problem, "Set parallel.tp_comm_overlap=false") from error


class PeerMemory:
    """Exchanges through memory that all ranks of a group address.

    Each rank has two slots of it, which exchanges take in turn. An exchange has one barrier, in the order of the stream
    that computes. So a rank that passed the barrier before knows that all others are done with the exchange before
    that one, and with its slot.
    """

    def __init__(self, group: ProcessGroup, device: torch.device, size: int) -> None:
        self.rank, self.ranks = group.rank(), group.size()
        self._group, self._device = group, device
        # Of high priority: a copy is under way long before its rows are needed.
        self._pulling, self._pushing = (torch.cuda.Stream(device, priority=-1) for _ in range(2))
        self._count = 0
        self._size = 0
        self._allocate(size)

    def gather(self, rows: Tensor) -> "_Pulled":
        """Start to gather all ranks' rows [m, w]."""
        return _Pulled(self, rows)

    def scatter(self, rows: Tensor, width: int) -> "_Pushed":
        """Prepare parts [m, w] for all ranks' rows [p m, k]."""
        return _Pushed(self, rows.new_empty(self.ranks - 1, len(rows) // self.ranks, width))

    def barrier(self) -> None:
        """Make the current stream wait until the other ranks' come here."""
        self._handle.barrier(channel=0)

    def next_slot(self, shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
        """Return each rank's next slot, [p, m, w]."""
        self._allocate(self.ranks * shape[0] * shape[1] * dtype.itemsize)
        self._count += 1
        key = (self._count % 2, shape, dtype)
        if key not in self._slots:
            start = self._count % 2 * self._size // dtype.itemsize
            self._slots[key] = [
                self._handle.get_buffer(rank, (self.ranks, *shape), dtype, start) for rank in range(self.ranks)
            ]
        return self._slots[key]

    def _allocate(self, size: int) -> None:
        if size <= self._size:
            return
        # Now nobody reads or writes the old memory. And ranks wait for each other here: torch's rendezvous would hold
        # Python's lock meanwhile, and with it the watchdog's thread.
        torch.distributed.all_reduce(torch.zeros(1, device=self._device), group=self._group)
        torch.cuda.synchronize(self._device)
        self._size = -(-size // 256) * 256
        self._memory = symmetric_memory.empty(2 * self._size, dtype=torch.uint8, device=self._device)
        self._handle = symmetric_memory.rendezvous(self._memory, self._group)
        self._slots: dict[tuple[int, tuple[int, int], torch.dtype], list[Tensor]] = {}


class _Pulled:
    """Gathers by copying from the peers' slots to this rank's."""

    def __init__(self, memory: PeerMemory, rows: Tensor) -> None:
        slots = memory.next_slot((rows.shape[0], rows.shape[1]), rows.dtype)
        self._rank, ranks = memory.rank, memory.ranks
        self.full = slots[self._rank]
        self.full[self._rank].copy_(rows)
        memory.barrier()
        self._stream = torch.cuda.current_stream()
        self._arrivals = []
        with torch.cuda.stream(memory._pulling):
            memory._pulling.wait_stream(self._stream)
            for i in range(1, ranks):
                peer = (self._rank + i) % ranks  # each rank is read by one other at a time
                self.full[peer].copy_(slots[peer][peer])
                self._arrivals.append((peer, memory._pulling.record_event()))

    def __iter__(self) -> Iterator[int]:
        yield self._rank
        for peer, arrival in self._arrivals:
            self._stream.wait_event(arrival)
            yield peer


class _Pushed:
    """Scatters by copying parts to the peers' slots, and sums this rank's."""

    def __init__(self, memory: PeerMemory, parts: Tensor) -> None:
        self.ranks = memory.ranks
        self._memory, self._parts = memory, parts  # the peers': their slots may be in use while one is computed
        self._slots = memory.next_slot((parts.shape[1], parts.shape[2]), parts.dtype)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        memory, rank = self._memory, self._memory.rank
        stream, pushing = torch.cuda.current_stream(), memory._pushing
        for i, part in enumerate(self._parts, 1):
            peer = (rank + i) % memory.ranks
            yield peer, part
            with torch.cuda.stream(pushing):
                pushing.wait_stream(stream)
                self._slots[peer][rank].copy_(part)
        yield rank, self._slots[rank][rank]

    def sum(self, out: Tensor) -> None:
        torch.cuda.current_stream().wait_stream(self._memory._pushing)
        self._memory.barrier()
        leading_sum(self._slots[self._memory.rank], out)


class Collectives:
    """Exchanges by collectives, which hide nothing: on CPUs, for tests."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def gather(self, rows: Tensor) -> "_Gathered":
        """Gather all ranks' rows [m, w]."""
        return _Gathered(self._group, rows)

    def scatter(self, rows: Tensor, width: int) -> "_ReduceScattered":
        """Prepare parts [m, w] for all ranks' rows [p m, k]."""
        ranks = self._group.size()
        return _ReduceScattered(self._group, rows.new_empty(ranks, len(rows) // ranks, width))


class _Gathered:
    def __init__(self, group: ProcessGroup, rows: Tensor) -> None:
        self.full = rows.new_empty(group.size(), *rows.shape)
        torch.distributed.all_gather_into_tensor(self.full.flatten(0, 1), rows, group=group)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.full)))


class _ReduceScattered:
    def __init__(self, group: ProcessGroup, parts: Tensor) -> None:
        self.ranks = group.size()
        self._group, self._parts = group, parts

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        return enumerate(self._parts)

    def sum(self, out: Tensor) -> None:
        torch.distributed.reduce_scatter_tensor(out, self._parts.flatten(0, 1), group=self._group)
