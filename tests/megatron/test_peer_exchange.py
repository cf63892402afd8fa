"""Exchanges through peers' memory give each rank what collectives would; here ranks are threads, and copies immediate.

On GPUs, test_overlapped_linear.py runs them as they are.
"""

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Barrier, current_thread
from time import sleep
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from s2train.errors import ConfigError
from s2train.megatron import peer_exchange
from s2train.megatron.peer_exchange import PeerMemory, tensor_parallel_exchange
from tests.validation.test_rejections import config

RANKS, ROWS, WIDTH = 4, 3, 5
Runner = Callable[[Callable[[PeerMemory], None]], None]


class Memory:
    """What torch's symmetric memory gives a rank."""

    def __init__(self, rank: int, of_ranks: dict[int, Tensor], barrier: Barrier) -> None:
        self._of_ranks, self._barrier = of_ranks, barrier

    def get_buffer(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype, start: int) -> Tensor:
        count = torch.Size(shape).numel()
        return self._of_ranks[rank].view(dtype)[start : start + count].view(shape)

    def barrier(self, channel: int) -> None:
        self._barrier.wait()


def rank_of_thread() -> int:
    return int(current_thread().name.rpartition("_")[2])


@pytest.fixture
def on_every_rank() -> Iterator[Runner]:
    """Runs a function on all ranks at once."""
    of_ranks: dict[int, Tensor] = {}
    barrier = Barrier(RANKS, timeout=400)

    def rendezvous(memory: Tensor, group: Any) -> Memory:
        of_ranks[rank_of_thread()] = memory
        barrier.wait()
        return Memory(rank_of_thread(), of_ranks, barrier)

    def one(function: Callable[[PeerMemory], None]) -> None:
        barrier.wait()  # a thread for each rank
        group = mock.Mock(**{"rank.return_value": rank_of_thread(), "size.return_value": RANKS})
        function(PeerMemory(group, torch.device("cpu"), 8 * RANKS * ROWS * WIDTH))

    def all_of(function: Callable[[PeerMemory], None]) -> None:
        with ThreadPoolExecutor(RANKS) as pool:
            list(pool.map(one, RANKS * [function]))

    def all_reduce(x: Tensor, group: Any) -> None:
        barrier.wait()

    cuda = {"Stream": mock.Mock(), "current_stream": mock.Mock(), "stream": lambda _: nullcontext()}
    cuda["synchronize"] = mock.Mock()
    memory = {"empty": torch.empty, "rendezvous": rendezvous}
    with (
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.multiple(peer_exchange.symmetric_memory, **memory),
        mock.patch.object(torch.distributed, "all_reduce", all_reduce),
        mock.patch.object(peer_exchange, "leading_sum", lambda parts, out: out.copy_(parts.sum(0))),
    ):
        yield all_of


def rows_of(sender: int, receiver: int, turn: int) -> Tensor:
    first = 1000 * turn + 100 * sender + 10 * receiver
    return torch.arange(first, first + ROWS * WIDTH, dtype=torch.float64).view(ROWS, WIDTH)


def gather(memory: PeerMemory, turn: int) -> Callable[[], None]:
    """Start to gather; the result checks what came."""
    gathered = memory.gather(rows_of(memory.rank, 0, turn))

    def check() -> None:
        order = list(gathered)
        assert order[0] == memory.rank
        assert sorted(order) == list(range(RANKS))
        assert torch.equal(gathered.full, torch.stack([rows_of(sender, 0, turn) for sender in range(RANKS)]))

    return check


def scatter(memory: PeerMemory, turn: int) -> Callable[[], None]:
    sums = memory.scatter(torch.empty(RANKS * ROWS, 2, dtype=torch.float64), WIDTH)
    for receiver, part in sums:
        sleep(random.random() / 500)
        part.copy_(rows_of(memory.rank, receiver, turn))

    def check() -> None:
        out = torch.empty(ROWS, WIDTH, dtype=torch.float64)
        sums.sum(out)
        assert torch.equal(out, sum(rows_of(sender, memory.rank, turn) for sender in range(RANKS)))

    return check


def forward(memory: PeerMemory, turn: int) -> None:
    gather(memory, turn)()
    scatter(memory, turn)()


def backward(memory: PeerMemory, turn: int) -> None:
    """Gather inputs while gradients are computed and sent."""
    check_inputs = gather(memory, turn)
    check_sums = scatter(memory, turn)
    check_inputs()
    check_sums()


def pair_backward(memory: PeerMemory, turn: int) -> None:
    """Gather gradients, then inputs while other things are computed."""
    gather(memory, turn)()
    backward(memory, turn)


@pytest.mark.parametrize("exchange", [forward, backward, pair_backward])
def test_each_rank_gets_its_rows(on_every_rank: Runner, exchange: Callable[[PeerMemory, int], None]) -> None:
    """In turns, at any speed of the ranks: memory is written again when nobody needs it."""

    def several(memory: PeerMemory) -> None:
        for turn in range(20):
            sleep(random.random() / 500)
            exchange(memory, turn)

    on_every_rank(several)


def test_memory_grows_with_the_rows(on_every_rank: Runner) -> None:
    def several(memory: PeerMemory) -> None:
        for rows in (ROWS, 2 * ROWS, 5 * ROWS, ROWS):
            gathered = memory.gather(torch.full((rows, WIDTH), memory.rank, dtype=torch.float64))
            assert len(list(gathered)) == RANKS
            expected = torch.arange(RANKS, dtype=torch.float64)[:, None, None].expand(RANKS, rows, WIDTH)
            assert gathered.full.equal(expected)

    on_every_rank(several)


def test_gpus_without_peer_access_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(parallel__tp=2, parallel__sequence_parallel=True, parallel__tp_comm_overlap=True)
    message = r"can't share memory of their GPUs \(RuntimeError: no peers\). Set parallel.tp_comm_overlap=false"
    monkeypatch.setattr(peer_exchange, "PeerMemory", mock.Mock(side_effect=RuntimeError("no peers")))
    monkeypatch.setattr(peer_exchange.parallel_state, "get_tensor_model_parallel_group", mock.Mock())
    with pytest.raises(ConfigError, match=f"^parallel.tp_comm_overlap=true: .*{message}"):
        tensor_parallel_exchange(cfg, torch.device("cuda"))
