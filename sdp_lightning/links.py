"""Whole values between two processes over one connection, without ever blocking.

Whoever waits does it in :func:`wait_for_any`, between two looks at whatever else may end the wait.
"""

from __future__ import annotations

import contextlib
import pickle
import selectors
import socket
from collections.abc import Iterable
from typing import Any

_HEADER = 8  # bytes: the length of what follows
_CHUNK = 2**20


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
            while self.is_sending:
                with memoryview(self._unsent) as unsent:
                    count = self._connection.send(unsent[:_CHUNK])
                del self._unsent[:count]
        except BlockingIOError:
            return
        except OSError:
            self.is_gone = True

    def receive(self) -> list[Any]:
        """The values that have come whole since the last call, in order."""
        try:
            while not self.is_gone:
                data = self._connection.recv(_CHUNK)
                self._received += data
                self.is_gone = not data
                if len(data) < _CHUNK:
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
    with selectors.DefaultSelector() as selector:
        for link in links:
            with contextlib.suppress(ValueError):  # closed here
                writes = selectors.EVENT_WRITE if link.is_sending else 0
                selector.register(link, selectors.EVENT_READ | writes)
        selector.select(timeout_s)
