"""Whole values between two processes over one connection, without ever blocking.

Whoever waits does it in :func:`wait_for_any`, between two looks at whatever else may end the wait.
"""

from __future__ import annotations

import pickle
import select
import socket
from collections.abc import Iterable
from typing import Any

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
_HEADER = 8  # bytes: the length of what follows
_CHUNK = 2**16


class Link:
    """One end of a connection. What is sent and what has come in part waits for the next look.

    Values are pickled: the other end must be a process of this training.

    Args:
        connection: taken over, and closed by ``close``.

    Attributes:
        is_gone: whether the other end has closed it, or its process has ended.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.is_gone = False
        self._connection = connection
        self._unsent, self._received = bytearray(), bytearray()
        self._chunk = memoryview(bytearray(_CHUNK))  # a new one for each would take longer

    @property
    def is_sending(self) -> bool:
        """Whether something is still to be sent."""
        return bool(self._unsent) and not self.is_gone

    def fileno(self) -> int:
        """Of the connection, for a selector."""
        return self._connection.fileno()

    def send(self, data: bytes) -> None:
        """Send what :func:`pack` made: as much as fits now, the rest with later calls."""
        self._unsent += data
        self.push()

    def push(self) -> None:
        """Send what fits now."""
        try:
            while self._unsent and not self.is_gone:
                del self._unsent[: self._connection.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError:
            self.is_gone = True

    def receive(self) -> list[Any]:
        """The values that have come whole since the last call, in order."""
        try:
            while not self.is_gone:
                size = self._connection.recv_into(self._chunk)
                self._received += self._chunk[:size]
                self.is_gone = not size
                if size < _CHUNK:
                    break
        except BlockingIOError:
            pass
        except OSError:
            self.is_gone = True
        values: list[Any] = []
        while len(self._received) >= _HEADER:
            end = _HEADER + int.from_bytes(self._received[:_HEADER])
            if len(self._received) < end:
                break
            values.append(pickle.loads(self._received[_HEADER:end]))
            del self._received[:end]
        return values

    def close(self) -> None:
        """Safe to call twice."""
        self.is_gone = True
        self._connection.close()


def pack(value: object) -> bytes:
    """``value``, as :meth:`Link.send` takes it."""
    data = pickle.dumps(value)
    return len(data).to_bytes(_HEADER) + data


def wait_for_any(links: Iterable[Link], timeout_s: float) -> None:
    """Until one of them has something to read, or room for what it has to send."""
    poll = select.poll()  # a selector costs a third of a meeting
    for link in links:
        if link.fileno() >= 0:  # else closed here
            poll.register(link, select.POLLIN | (select.POLLOUT if link.is_sending else 0))
    poll.poll(1000 * timeout_s)
