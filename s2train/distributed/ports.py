"""Holds a port for a program that listens there later."""

import socket


def hold_port(port: int = 0) -> socket.socket:
    """Bind a port without listening, for another program to do so.

    A number that is only chosen may be taken before that program has imported what it needs. Linux gives a bound port
    to no program that asks for any port or connects. One that asks for this port and sets SO_REUSEADDR, as torch's
    store and web servers do, may bind it, since the socket here sets it too and never listens.

    Args:
        port: which; 0: any.
    Returns:
        The socket, which holds the port until it is closed.
    Raises:
        OSError: the port is in use.
    """
    held = socket.socket()
    try:
        held.bind(("", port))
    except OSError:
        held.close()
        raise
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not before: two holders could share a port
    return held


def port_of(held: socket.socket) -> int:
    """Return the number of the port that a socket has."""
    number: int = held.getsockname()[1]
    return number
