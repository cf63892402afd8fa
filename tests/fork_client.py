"""Runs a Python program as a fork of the server in tests/forked.py: `python -S fork_client.py SOCKET PROGRAM …`.

Stands for the program's process: it hands signals on to the fork, ends as that does, and if it is killed, so are the
fork and all processes that the fork started. It imports little, and starts in some hundredths of a second.
"""

import json
import os
import signal
import socket
import sys
from types import FrameType

HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[1])
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)
    request = {"command": sys.argv[2:], "cwd": os.getcwd(), "environment": dict(os.environ)}
    socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
    answers = connection.makefile()
    fork = int(answers.readline())

    def hand_on(number: int, frame: FrameType | None) -> None:
        os.kill(fork, number)

    for number in HANDED_ON:
        signal.signal(number, hand_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
    status = int(answers.readline())
    if status >= 0:
        os._exit(status)
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)


if __name__ == "__main__":
    main()
