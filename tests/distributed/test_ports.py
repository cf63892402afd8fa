"""A port is held for the program that is to listen there."""

import socket

import pytest
from torch.distributed import TCPStore

from s2train.distributed.ports import hold_port, port_of


def test_no_other_program_can_bind_a_held_port() -> None:
    with hold_port() as held, socket.socket() as other:
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port_of(held)))
        with pytest.raises(OSError, match="in use"):
            hold_port(port_of(held))


@pytest.mark.parametrize("use_libuv", [True, False])
def test_torchs_store_listens_on_a_held_port_and_again_after_it_has_ended(use_libuv: bool) -> None:
    with hold_port() as held:
        for _ in range(2):
            place = ("127.0.0.1", port_of(held), 2)
            store = TCPStore(*place, is_master=True, wait_for_workers=False, use_libuv=use_libuv)
            client = TCPStore(*place, is_master=False, use_libuv=use_libuv)
            store.set("key", "value")
            assert client.get("key") == b"value"
            del client, store
